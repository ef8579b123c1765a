"""SVDs distributed by cost: batches, the same results on one process and on three."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from support.spawn import spawn
from torch import Tensor

from hpc_oialr.distributed import World
from hpc_oialr.errors import NonFiniteError
from hpc_oialr.linalg.svd import SVD, svds
from hpc_oialr.linalg.work_plan import LayerWork, Task, svd_rounds
from hpc_oialr.method.engine import Peers, _OneProcess
from hpc_oialr.method.svd_scheduler import Job, distribute

SHAPES = [(9, 9)] * 5 + [(600, 8)] + [(12, 9)] * 2


Results = tuple[dict[int, Tensor], set[int]]  # all values; which of them took time here


def job(index: int) -> Job:
    """Of a random matrix; its result are all factors."""
    m, n = SHAPES[index]
    A = torch.randn(m, n, generator=torch.Generator().manual_seed(index))
    k = min(m, n)

    def pack(factors: SVD) -> list[Tensor]:
        U, s, Vh = factors
        return [s, U, Vh]

    return Job(LayerWork(f"layer {index}", m, n), lambda: A, pack, [(k,), (k * (m + n),)], A)


def batches(works: list[LayerWork], processes: int, **_: object) -> list[list[Task]]:
    """As a GPU would get them."""
    rounds = svd_rounds(works, processes)
    assert max(len(task.layers) for tasks in rounds for task in tasks) > 1
    return rounds


def results(rank: int, size: int) -> Results:
    world = World.single("cpu") if size == 1 else World.from_environment(device="cpu", timeout_s=60)
    jobs = [job(i) for i in range(len(SHAPES))]
    found = list(distribute(jobs, world))
    with mock.patch("hpc_oialr.method.svd_scheduler.svd_rounds", batches):
        in_batches = {result.index: torch.cat(result.values) for result in distribute(jobs, world)}
    assert all(torch.equal(in_batches[r.index], torch.cat(r.values)) for r in found), "a batch is a loop on a CPU"
    assert sorted(result.index for result in found) == list(range(len(SHAPES)))
    return {r.index: torch.cat(r.values) for r in found}, {r.index for r in found if r.seconds}


@pytest.fixture(scope="module")
def together() -> list[Results]:
    return spawn(results, 3)


def test_the_same_results_on_one_process_and_on_three(together: list[Results]) -> None:
    alone, _ = results(0, 1)
    for values, _ in together:
        for index, value in values.items():
            assert torch.equal(value, alone[index])
    worked = [index for _, mine in together for index in mine]
    assert sorted(worked) == list(range(len(SHAPES)))


def with_nan(rank: int, size: int) -> tuple[str, list[int]]:
    jobs = [job(i) for i in range(len(SHAPES))]
    jobs[3].prepare()[0, 0] = torch.nan
    world = World.from_environment(device="cpu", timeout_s=60)
    with pytest.raises(NonFiniteError) as caught:
        list(distribute(jobs, world))
    found = {result.index: torch.cat(result.values) for result in distribute(jobs, world, careful=False)}
    failed = [index for index, values in found.items() if not bool(values.isfinite().all())]
    return str(caught.value), failed


def test_a_failure_stops_every_process() -> None:
    found = spawn(with_nan, 2)
    texts = [text for text, _ in found]
    assert [failed for _, failed in found] == [[3], [3]], "where nobody waits, it is NaN on every process"
    assert any(text.startswith("layer 3 holds 1 NaN or Inf among 81 values") for text in texts)
    assert all("layer " in text for text in texts)


class TwoRanks(Peers):
    """Rank 0 of two; the other one's room is ``there``."""

    size = 2  # type: ignore[assignment]

    def __init__(self, there: int) -> None:
        self.there = there

    def all_reduce(self, tensor: Tensor, op: Any = "sum") -> Tensor:
        assert op == "min"
        return tensor.clamp(max=self.there)


@pytest.mark.parametrize(
    ("jobs_that_fit", "batches"),
    [(5.5, [5]), (2.5, [2, 2, 1]), (1.0, [1] * 5), (0.1, [1] * 5), (None, [5])],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_batch_makes_no_new_peak_on_any_rank(
    jobs_that_fit: float | None, batches: list[int], ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    like: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device("cpu"))
    jobs = [replace(job(i), like=like) for i in range(5)]
    # Twelve float64 matrices of 9 x 9, and in fp32 every rank's result.
    each = 8 * 12 * 9 * 9 + 4 * ranks * (9 + 2 * 9 * 9)
    held, room = 10**3, 10**6 if jobs_that_fit is None else round(jobs_that_fit * each)
    # None: nothing has shown a peak yet.
    peak = held if jobs_that_fit is None else held + (10**6 if ranks == 2 else room)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak)
    world = _OneProcess() if ranks == 1 else TwoRanks(room)
    sizes: list[int] = []

    def counted(matrices: list[Tensor], names: list[str], *, careful: bool) -> list[SVD]:
        sizes.append(len(matrices))
        return svds(matrices, names, careful=careful)

    monkeypatch.setattr("hpc_oialr.method.svd_scheduler.svds", counted)
    found = list(distribute(jobs, world, owners=[0] * 5, careful=False))
    assert sizes == batches
    assert sorted(result.index for result in found) == list(range(5))
