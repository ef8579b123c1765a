"""Schedules SVDs over ranks: each rank computes some of them, and all ranks get all results."""

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
    prepare: Callable[[], Tensor]  # returns the matrix; called on every rank before one of them factorises it
    pack: Callable[[SVD], Tensor]  # makes the result, one flat tensor, from the factors; called on that rank
    size: int  # of the result
    like: Tensor  # has the result's device and the matrix' dtype


@dataclass(frozen=True)
class Result:
    """A job's index and values, and the time of the SVD on the rank that computed it (s; 0 on the others)."""

    index: int
    values: Tensor
    seconds: float


def distribute(
    jobs: Sequence[Job], world: Peers, *, owners: Sequence[int] | None = None, careful: bool = True
) -> Iterator[Result]:
    """Compute all jobs, distributed over ranks by cost, and broadcast every result, a round at a time.

    In a round each rank computes at most one matrix, or on a GPU several small ones of one shape. Results are used and
    freed before the next round. They have the same bits on any number of CPU ranks.

    ``owners`` are the jobs' ranks; by default longest processing time first. If ``careful``, ranks check together in each
    round that no job has failed, which waits for a GPU, and all raise :class:`NonFiniteError` if one did. Otherwise the
    result of a failed job is NaN on every rank, and the caller checks.
    """
    works = [job.work for job in jobs]
    # On a CPU a batch would be a loop that only needs more memory.
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
    """Raise on every rank if a job failed on one, so that none waits forever."""
    failed = 0 if failure is None or mine is None else mine.layers[0] + 1
    flag = world.all_reduce(torch.tensor([failed], device=jobs[0].like.device), op="max")
    if failure is not None:
        raise failure
    if world.size > 1 and (first := int(flag)) > 0:
        raise NonFiniteError(f"{jobs[first - 1].work.name}: no SVD on the rank that had to do it; see its log.")


def _empty(jobs: Sequence[Job], task: Task) -> Tensor:
    like, size = jobs[task.layers[0]].like, sum(jobs[i].size for i in task.layers)
    return torch.empty(size, dtype=compute_dtype(like.dtype), device=like.device)
