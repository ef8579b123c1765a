"""SVDs distributed by cost: batches, the same results on one process and on three."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from support.spawn import spawn
from torch import Tensor

from hpc_oialr.distributed import World
from hpc_oialr.errors import NonFiniteError
from hpc_oialr.linalg.svd import SVD
from hpc_oialr.linalg.work_plan import LayerWork, Task, svd_rounds
from hpc_oialr.method.svd_scheduler import Job, distribute

SHAPES = [(9, 9)] * 5 + [(600, 8)] + [(12, 9)] * 2


Results = tuple[dict[int, Tensor], set[int]]  # all values; which of them took time here


def job(index: int) -> Job:
    """Of a random matrix; its result are all factors."""
    m, n = SHAPES[index]
    A = torch.randn(m, n, generator=torch.Generator().manual_seed(index))
    k = min(m, n)

    def pack(factors: SVD) -> Tensor:
        U, s, Vh = factors
        return torch.cat([s, U.reshape(-1), Vh.reshape(-1)])

    return Job(LayerWork(f"layer {index}", m, n), lambda: A, pack, k * (1 + m + n), A)


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
        in_batches = {result.index: result.values for result in distribute(jobs, world)}
    assert all(torch.equal(in_batches[r.index], r.values) for r in found), "a batch is a loop on a CPU"
    assert sorted(result.index for result in found) == list(range(len(SHAPES)))
    return {r.index: r.values.clone() for r in found}, {r.index for r in found if r.seconds}


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
    failed = [
        found.index for found in distribute(jobs, world, careful=False) if not bool(found.values.isfinite().all())
    ]
    return str(caught.value), failed


def test_a_failure_stops_every_process() -> None:
    found = spawn(with_nan, 2)
    texts = [text for text, _ in found]
    assert [failed for _, failed in found] == [[3], [3]], "where nobody waits, it is NaN on every process"
    assert any(text.startswith("layer 3 holds 1 NaN or Inf among 81 values") for text in texts)
    assert all("layer " in text for text in texts)
