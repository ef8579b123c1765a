"""Schedules SVDs over ranks: each rank computes some of them, and all ranks get all results."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_oialr.errors import NonFiniteError
from hpc_oialr.linalg.svd import GRAM_BYTES, SVD, bytes_below_peak, compute_dtype, svds
from hpc_oialr.linalg.work_plan import BATCH_NUMBERS, LayerWork, Task, svd_rounds
from hpc_oialr.method.engine import Peers


@dataclass(frozen=True)
class Job:
    """One matrix to factorise, and what is sent of its factors."""

    work: LayerWork  # the layer's name and the matrix' shape
    prepare: Callable[[], Tensor]  # returns the matrix; called on every rank before one of them factorises it
    pack: Callable[[SVD], Sequence[Tensor]]  # makes what the result has, in order, from the factors; on that rank only
    shapes: Sequence[tuple[int, ...]]  # of the result's tensors
    like: Tensor  # has the result's device and the matrix' dtype

    @property
    def size(self) -> int:
        """Numbers in the result."""
        return sum(map(math.prod, self.shapes))


@dataclass(frozen=True)
class Result:
    """A job's index and tensors, and the time of the SVD on the rank that computed it (s; 0 on the others)."""

    index: int
    values: list[Tensor]
    seconds: float


def distribute(
    jobs: Sequence[Job],
    world: Peers,
    *,
    owners: Sequence[int] | None = None,
    careful: bool = True,
    room: int | None = None,
) -> Iterator[Result]:
    """Compute all jobs, distributed over ranks by cost, and broadcast every result, a round at a time.

    In a round each rank computes at most one matrix, or on a GPU several small ones of one shape. Results are used and
    freed before the next round. They have the same bits on any number of CPU ranks.

    ``owners`` are the jobs' ranks; by default longest processing time first. If ``careful``, ranks check together in each
    round that no job has failed, which waits for a GPU, and all raise :class:`NonFiniteError` if one did. Otherwise the
    result of a failed job is NaN on every rank, and the caller checks.

    ``room`` are the bytes that a batch on a GPU may take, the same on all ranks; by default :func:`agreed_room`.
    """
    works = [job.work for job in jobs]
    if room is None:
        room = agreed_room(jobs, world)
    # Bytes that a job takes, by number that it holds; a round brings every rank's results.
    sizes = ((job.work, compute_dtype(job.like.dtype).itemsize * job.size * world.size) for job in jobs)
    needed = max(((GRAM_BYTES * work.m * work.n + size) / work.numbers for work, size in sizes), default=1.0)
    batch_numbers = min(BATCH_NUMBERS, int(room / needed))
    for tasks in svd_rounds(works, world.size, owners=owners, batch_numbers=batch_numbers):
        yield from _one_round(jobs, tasks, world, careful=careful)


def agreed_room(jobs: Sequence[Job], world: Peers) -> int:
    """Bytes that jobs may take without a new peak of any rank's GPU memory; one all-reduce of a number. 0 on CPUs."""
    # On a CPU a batch would be a loop that only needs more memory.
    if not (jobs and jobs[0].like.is_cuda):
        return 0
    room = bytes_below_peak(jobs[0].like.device)
    if world.size > 1:
        room = int(world.all_reduce(torch.tensor([room], device=jobs[0].like.device), op="min"))
    return room


def _one_round(jobs: Sequence[Job], tasks: Sequence[Task], world: Peers, *, careful: bool) -> Iterator[Result]:
    """The results of one round. A function of its own, so that nothing of it is held during the next."""
    mine = next((task for task in tasks if task.rank == world.rank), None)
    matrices = {i: jobs[i].prepare() for task in tasks for i in task.layers}
    start, result, failure = time.perf_counter(), None, None
    if mine is not None:
        try:
            names = [jobs[i].work.name for i in mine.layers]
            factors = svds([matrices[i] for i in mine.layers], names, careful=careful)
            packed = (jobs[i].pack(each) for i, each in zip(mine.layers, factors, strict=True))
            result = torch.cat([part.reshape(-1) for parts in packed for part in parts])
            del factors
        except (NonFiniteError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            failure = error
    seconds = time.perf_counter() - start
    if careful:
        _agree(failure, mine, jobs, world)
    del matrices
    buffers = [_empty(jobs, task) if task is not mine or result is None else result for task in tasks]
    if mine is not None and failure is not None:
        buffers[tasks.index(mine)].fill_(torch.nan)
    pending = [world.broadcast(buffer, src=t.rank) for buffer, t in zip(buffers, tasks, strict=True)]
    for task, buffer, work in zip(tasks, buffers, pending, strict=True):
        if work is not None:
            work.wait()
        shapes = [shape for i in task.layers for shape in jobs[i].shapes]
        parts = iter(buffer.split_with_sizes(list(map(math.prod, shapes))))
        for i in task.layers:
            values = [next(parts).view(shape) for shape in jobs[i].shapes]
            yield Result(i, values, seconds / len(task.layers) if task is mine else 0.0)


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
