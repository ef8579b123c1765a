"""Scheduling of SVDs: balance, determinism, rounds, batches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_oialr.linalg.work_plan import LayerWork, longest_processing_time, svd_cost, svd_rounds

costs = st.lists(st.floats(0.1, 1e6), min_size=1, max_size=40)
shapes = st.lists(
    st.tuples(st.sampled_from([8, 16, 64, 200, 2000]), st.sampled_from([8, 32, 100])), min_size=1, max_size=30
)


@given(costs, st.integers(1, 8))
def test_bound_of_graham(costs: list[float], processes: int) -> None:
    owner = longest_processing_time(costs, processes)
    load = [sum(c for c, o in zip(costs, owner, strict=True) if o == p) for p in range(processes)]
    lower_bound = max(max(costs), sum(costs) / processes)
    assert max(load) <= 2 * lower_bound * (1 + 1e-12)
    assert owner == longest_processing_time(costs, processes)


@given(shapes, st.integers(1, 8))
def test_every_layer_is_done_once_by_its_owner(sizes: list[tuple[int, int]], processes: int) -> None:
    layers = [LayerWork("a", m, n) for m, n in sizes]
    owners = longest_processing_time([svd_cost(*size) for size in sizes], processes)
    rounds = svd_rounds(layers, processes)
    assert rounds == svd_rounds(layers, processes, owners=owners)
    tasks = [task for tasks in rounds for task in tasks]
    assert sorted(i for task in tasks for i in task.layers) == list(range(len(layers)))
    for task in tasks:
        assert {owners[i] for i in task.layers} == {task.rank}
        assert len({sizes[i] for i in task.layers}) == 1
        assert task.load == pytest.approx(len(task.layers) * svd_cost(*sizes[task.layers[0]]))
    batches = [(task.rank, sizes[task.layers[0]]) for task in tasks]
    assert len(batches) == len(set(batches)), "equal shapes of a rank are one batch"


@given(shapes, st.integers(1, 8))
def test_a_rank_has_one_task_a_round_and_its_longest_first(sizes: list[tuple[int, int]], processes: int) -> None:
    rounds = svd_rounds([LayerWork("a", m, n) for m, n in sizes], processes)
    for tasks in rounds:
        assert [task.rank for task in tasks] == sorted({task.rank for task in tasks})
    for rank in range(processes):
        mine = [[task.load for task in tasks if task.rank == rank] for tasks in rounds]
        assert mine == sorted(mine, reverse=True), "no round without a task before the last one"


def test_a_batch_holds_no_more_than_it_may() -> None:
    layers = [LayerWork("a", 10, 10)] * 3 + [LayerWork("b", 20, 20)] * 2 + [LayerWork("c", 5, 5, held=101)] * 2
    rounds = svd_rounds(layers, 1, batch_numbers=200)
    assert sorted(task.layers for (task,) in rounds) == [(0, 1), (2,), (3,), (4,), (5,), (6,)]
    assert all(len(task.layers) == 1 for (task,) in svd_rounds(layers, 1, batch_numbers=0))


@pytest.mark.parametrize(("processes", "limit"), [(2, 1.01), (4, 1.01), (8, 1.1), (16, 1.25)])
def test_vision_transformer_is_balanced(processes: int, limit: float) -> None:
    """ViT-B/16: 48 square weights, 24 of the MLP."""
    sizes = [(768, 768)] * 48 + [(3072, 768), (768, 3072)] * 12
    rounds = svd_rounds([LayerWork(str(i), m, n) for i, (m, n) in enumerate(sizes)], processes)
    loads = [0.0] * processes
    for task in (task for tasks in rounds for task in tasks):
        loads[task.rank] += task.load
    assert max(loads) * processes / sum(loads) < limit
