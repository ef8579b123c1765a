"""Dealing work: balance, determinism, rounds."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_oialr.linalg.work_plan import LayerWork, WorkPlan, longest_processing_time, svd_cost


def loads(plan: WorkPlan) -> list[float]:
    return [sum(task.load for task in plan.of_process(rank)) for rank in range(plan.processes)]


costs = st.lists(st.floats(0.1, 1e6), min_size=1, max_size=40)


@given(costs, st.integers(1, 8))
def test_bound_of_graham(costs: list[float], processes: int) -> None:
    owner = longest_processing_time(costs, processes)
    load = [sum(c for c, o in zip(costs, owner, strict=True) if o == p) for p in range(processes)]
    lower_bound = max(max(costs), sum(costs) / processes)
    assert max(load) <= 2 * lower_bound * (1 + 1e-12)
    assert owner == longest_processing_time(costs, processes)


shapes = st.lists(
    st.tuples(st.sampled_from([8, 16, 64, 200, 2000]), st.sampled_from([8, 32, 100])), min_size=1, max_size=30
)


@given(shapes, st.integers(1, 8), st.booleans())
def test_plan_does_every_layer_once(sizes: list[tuple[int, int]], processes: int, share: bool) -> None:
    layers = [LayerWork(f"layer{i}", m, n) for i, (m, n) in enumerate(sizes)]
    plan = WorkPlan.of(layers, processes, share=share)
    assert sorted(i for task in plan.tasks for i in task.layers) == list(range(len(layers)))
    fair = sum(svd_cost(m, n) for m, n in sizes) / processes
    for task in plan.tasks:
        assert len({sizes[i] for i in task.layers}) == 1
        assert list(task.processes) == sorted(set(task.processes))
        alone = svd_cost(*sizes[task.layers[0]])
        together = svd_cost(*sizes[task.layers[0]], min(processes, math.ceil(alone / fair)))
        worth = share and alone > fair and together <= 0.8 * alone
        assert (len(task.processes) > 1) == worth
        assert task.load == pytest.approx(together if worth else len(task.layers) * alone)
    assert plan == WorkPlan.of(layers, processes, share=share)


@given(shapes, st.integers(1, 8))
def test_rounds_hold_every_task_once_in_order_and_one_a_process(
    sizes: list[tuple[int, int]], processes: int
) -> None:
    plan = WorkPlan.of([LayerWork("a", m, n) for m, n in sizes], processes)
    rounds = plan.rounds()
    for tasks in rounds:
        members = [p for task in tasks for p in task.processes]
        assert len(members) == len(set(members))
    for rank in range(processes):
        found = [task for tasks in rounds for task in tasks if rank in task.processes]
        assert found == plan.of_process(rank)


def test_square_layers_are_never_shared() -> None:
    """All processes would wait for the SVD of one triangle as large as the matrix."""
    plan = WorkPlan.of([LayerWork("large", 4096, 4096), LayerWork("small", 64, 64)], 8)
    assert all(len(task.processes) == 1 for task in plan.tasks)


def test_a_batch_holds_no_more_than_it_may() -> None:
    layers = (
        [LayerWork("a", 10, 10)] * 3 + [LayerWork("b", 20, 20)] * 2 + [LayerWork("c", 5, 5, held=101)] * 2
    )
    plan = WorkPlan.with_owners(layers, [0] * 7, 1, batch_numbers=200)
    assert sorted(task.layers for task in plan.tasks) == [(0, 1), (2,), (3,), (4,), (5,), (6,)]
    assert all(len(task.layers) == 1 for task in WorkPlan.of(layers, 1, batch_numbers=0).tasks)


@given(shapes, st.integers(1, 8))
def test_shared_tasks_come_first_and_in_one_order(sizes: list[tuple[int, int]], processes: int) -> None:
    plan = WorkPlan.of([LayerWork("a", m, n) for m, n in sizes], processes)
    for rank in range(processes):
        team_sizes = [len(task.processes) > 1 for task in plan.of_process(rank)]
        assert team_sizes == sorted(team_sizes, reverse=True)


@given(shapes, st.integers(1, 8))
def test_equal_shapes_of_a_process_are_one_batch(sizes: list[tuple[int, int]], processes: int) -> None:
    plan = WorkPlan.of([LayerWork("a", m, n) for m, n in sizes], processes)
    for rank in range(processes):
        batches = [sizes[task.layers[0]] for task in plan.of_process(rank) if len(task.processes) == 1]
        assert len(batches) == len(set(batches))


@pytest.mark.parametrize(("processes", "limit"), [(2, 1.01), (4, 1.01), (8, 1.1), (16, 1.25)])
def test_vision_transformer_is_balanced(processes: int, limit: float) -> None:
    """ViT-B/16: 48 square weights, 24 of the MLP."""
    sizes = [(768, 768)] * 48 + [(3072, 768), (768, 3072)] * 12
    plan = WorkPlan.of([LayerWork(str(i), m, n) for i, (m, n) in enumerate(sizes)], processes)
    assert max(loads(plan)) * processes / sum(loads(plan)) < limit


def test_given_costs_count() -> None:
    plan = WorkPlan.of([LayerWork("a", 8, 8, cost=1.0), LayerWork("b", 8, 8, cost=1.0)], 2)
    assert loads(plan) == [1.0, 1.0]
