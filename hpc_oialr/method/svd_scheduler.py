"""SVDs scheduled over ranks: each rank computes its own, all get all results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_oialr.errors import NonFiniteError
from hpc_oialr.linalg.svd import SVD, compute_dtype, svds
from hpc_oialr.linalg.work_plan import BATCH_NUMBERS, LayerWork, Task, svd_rounds
from hpc_oialr.method.engine import Peers


@dataclass(frozen=True)
class Job:
    """One matrix to factorise, and what is sent of its factors."""

    work: LayerWork  # the layer's name and the matrix' shape
    prepare: Callable[[], Tensor]  # gives the matrix; called on every rank before one of them does the work
    pack: Callable[[SVD], Tensor]  # makes the result of the factors, one flat tensor; called where they are
    size: int  # of the result
    like: Tensor  # of the result's device, and of the dtype in which the SVD is computed


@dataclass(frozen=True)
class Result:
    """A job's index, its values, and the time they took where they were computed (s; 0 elsewhere)."""

    index: int
    values: Tensor
    seconds: float


def distribute(
    jobs: Sequence[Job], world: Peers, *, owners: Sequence[int] | None = None, careful: bool = True
) -> Iterator[Result]:
    """Compute all jobs, distributed by cost, and send every result to all ranks, a round at a time.

    In a round each rank does at most one task: one matrix, or on a GPU several small ones of one shape. Results are
    used and freed before the next round. Sends the jobs' results; they have the same bits on any number of CPU
    ranks.

    ``owners`` are the ranks of the jobs; default by longest processing time first. If ``careful``, ranks agree in each
    round that no job has failed, which waits for a GPU, and raise :class:`NonFiniteError` on every rank if one did.
    Otherwise what failed is NaN on every rank, and the caller checks.
    """
    works = [job.work for job in jobs]
    # On a CPU a batch would be a loop, and only hold more at a time.
    batch_numbers = BATCH_NUMBERS if jobs and jobs[0].like.is_cuda else 0
    for tasks in svd_rounds(works, world.size, owners=owners, batch_numbers=batch_numbers):
        mine = next((task for task in tasks if task.rank == world.rank), None)
        matrices = {i: jobs[i].prepare() for task in tasks for i in task.layers}
        start, values, failure = time.perf_counter(), None, None
        if mine is not None:
            try:
                names = [works[i].name for i in mine.layers]
                factors = svds([matrices[i] for i in mine.layers], names, careful=careful)
                values = torch.cat([jobs[i].pack(each) for i, each in zip(mine.layers, factors, strict=True)])
            except (NonFiniteError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
                failure = error
        seconds = time.perf_counter() - start
        if careful:
            _agree(failure, mine, jobs, world)
        del matrices
        buffers = [_empty(jobs, task) if task is not mine or values is None else values for task in tasks]
        if mine is not None and failure is not None:
            buffers[tasks.index(mine)].fill_(torch.nan)
        pending = [world.broadcast(buffer, src=t.rank) for buffer, t in zip(buffers, tasks, strict=True)]
        for task, buffer, work in zip(tasks, buffers, pending, strict=True):
            if work is not None:
                work.wait()
            for i, part in zip(task.layers, buffer.split([jobs[i].size for i in task.layers]), strict=True):
                yield Result(i, part, seconds / len(task.layers) if task is mine else 0.0)


def _agree(failure: Exception | None, mine: Task | None, jobs: Sequence[Job], world: Peers) -> None:
    """Raise on every rank if one has failed, so that none waits forever."""
    failed = 0 if failure is None or mine is None else mine.layers[0] + 1
    flag = world.all_reduce(torch.tensor([failed], device=jobs[0].like.device), op="max")
    if failure is not None:
        raise failure
    if world.size > 1 and (first := int(flag)) > 0:
        raise NonFiniteError(
            f"{jobs[first - 1].work.name}: no SVD on the rank that had to do it; see its log."
        )


def _empty(jobs: Sequence[Job], task: Task) -> Tensor:
    like, size = jobs[task.layers[0]].like, sum(jobs[i].size for i in task.layers)
    return torch.empty(size, dtype=compute_dtype(like.dtype), device=like.device)
