"""SVDs scheduled over ranks: each rank does its own tasks, all get all results."""

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
    """One matrix to factorise, and what is to be known of its factors.

    Attributes
    ----------
    work
        The layer's name and the matrix' shape.
    prepare
        The matrix; called on every process before one of them does the work.
    pack
        The result as one flat tensor, from the factors; called where they are.
    size
        Number of values of the result.
    like
        A tensor of whose device the result is, and of the dtype in which its SVD is computed.
    """

    work: LayerWork
    prepare: Callable[[], Tensor]
    pack: Callable[[SVD], Tensor]
    size: int
    like: Tensor


@dataclass(frozen=True)
class Result:
    """A job's index, its values, and the time they took where they were computed (s; 0 elsewhere)."""

    index: int
    values: Tensor
    seconds: float


def distribute(
    jobs: Sequence[Job], world: Peers, *, owners: Sequence[int] | None = None, careful: bool = True
) -> Iterator[Result]:
    """Compute all jobs, distributed by cost, and hand every result to all ranks, a round at a time.

    In a round each rank does at most one task: one matrix, or on a GPU several small ones of one shape. Results are
    applied and freed before the next round. Sends the jobs' results; they have the same bits on any number of CPU
    processes.

    Parameters
    ----------
    owners
        Rank of each job; default by longest processing time first.
    careful
        Whether processes agree in each round that no job has failed, which waits for a GPU. Otherwise what failed
        is NaN on every process, and the caller looks.

    Raises
    ------
    NonFiniteError
        On every process, if any job failed on any; only if ``careful``.
    """
    # On a CPU a batch would be a loop, and only hold more at a time.
    batch_numbers = BATCH_NUMBERS if jobs and jobs[0].like.is_cuda else 0
    works = [job.work for job in jobs]
    for tasks in svd_rounds(works, world.size, owners=owners, batch_numbers=batch_numbers):
        mine = next((task for task in tasks if task.rank == world.rank), None)
        matrices = {i: jobs[i].prepare() for task in tasks for i in task.layers}
        compute = _compute_agreed if careful else _compute_or_nan
        values, seconds = compute(jobs, mine, matrices, world)
        del matrices
        buffers = [values if task is mine and values is not None else _empty(jobs, task) for task in tasks]
        pending = [world.broadcast(buffer, src=t.rank) for buffer, t in zip(buffers, tasks, strict=True)]
        for task, buffer, work in zip(tasks, buffers, pending, strict=True):
            if work is not None:
                work.wait()
            for i, part in zip(task.layers, buffer.split([jobs[i].size for i in task.layers]), strict=True):
                yield Result(i, part, seconds / len(task.layers) if task is mine else 0.0)


def _compute_agreed(
    jobs: Sequence[Job], mine: Task | None, matrices: dict[int, Tensor], world: Peers
) -> tuple[Tensor | None, float]:
    """Do this process's task; every process raises if one failed, so that none waits for ever."""
    start, values, failure = time.perf_counter(), None, None
    try:
        values = None if mine is None else _compute(jobs, mine, matrices)
    except NonFiniteError as error:
        failure = error
    seconds = time.perf_counter() - start
    failed = torch.tensor(
        [0 if failure is None or mine is None else mine.layers[0] + 1], device=jobs[0].like.device
    )
    world.all_reduce(failed, op="max")
    if failure is not None:
        raise failure
    if world.size > 1 and int(failed) > 0:
        raise NonFiniteError(
            f"{jobs[int(failed) - 1].work.name}: no SVD on the process that had to do it; see its log."
        )
    return values, seconds


def _compute_or_nan(
    jobs: Sequence[Job], mine: Task | None, matrices: dict[int, Tensor], world: Peers
) -> tuple[Tensor | None, float]:
    """Do this process's task; NaN if it failed."""
    if mine is None:
        return None, 0.0
    start = time.perf_counter()
    try:
        values = _compute(jobs, mine, matrices, careful=False)
    except (NonFiniteError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        values = _empty(jobs, mine).fill_(torch.nan)
    return values, time.perf_counter() - start


def _compute(jobs: Sequence[Job], task: Task, matrices: dict[int, Tensor], *, careful: bool = True) -> Tensor:
    """The task's results in a row."""
    names = [jobs[i].work.name for i in task.layers]
    factors = svds([matrices[i] for i in task.layers], names, careful=careful)
    return torch.cat([jobs[i].pack(found) for i, found in zip(task.layers, factors, strict=True)])


def _empty(jobs: Sequence[Job], task: Task) -> Tensor:
    like = jobs[task.layers[0]].like
    size = sum(jobs[i].size for i in task.layers)
    return torch.empty(size, dtype=compute_dtype(like.dtype), device=like.device)
