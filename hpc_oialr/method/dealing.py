"""SVD work dealt over processes: each does its own jobs, everyone gets all results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpc_oialr.errors import NonFiniteError
from hpc_oialr.linalg.work_plan import longest_processing_time, rounds
from hpc_oialr.processes import World


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Job:
    """One factorisation, its result as one flat tensor.

    Attributes
    ----------
    name
        The layer.
    prepare
        Called on every process before the work is done on one: what needs all of them.
    compute
        Does the work with what ``prepare`` gave; called on one process only.
    size, like
        Number of values of the result; a tensor whose device it has.
    dtype
        Dtype of the result.
    cost
        Relative time, for the plan.
    """

    name: str
    compute: Callable[[Any], Tensor]
    size: int
    like: Tensor
    dtype: torch.dtype
    cost: float
    prepare: Callable[[], Any] = _nothing


@dataclass(frozen=True)
class Result:
    """A job's index, its values, and the time they took where they were computed (s; 0 elsewhere)."""

    index: int
    values: Tensor
    seconds: float


def deal(jobs: Sequence[Job], world: World, *, owners: Sequence[int] | None = None) -> Iterator[Result]:
    """Compute every job on one process and hand its result to all, a round at a time.

    A round holds at most one job per process, so that results are applied and freed before the next
    is computed. Sends the jobs' results only: ``sum(size)`` values in all.

    Parameters
    ----------
    owners
        Process of each job; default longest processing time first.

    Raises
    ------
    NonFiniteError
        On every process, if any job failed on any.
    """
    owners = owners or longest_processing_time([job.cost for job in jobs], world.size)
    for members in rounds(owners, world.size):
        mine = next((i for i in members if owners[i] == world.rank), None)
        prepared = {i: jobs[i].prepare() for i in members}
        values, seconds = _compute_agreed(jobs, mine, world, prepared)
        buffers = {i: values if i == mine else _empty(jobs[i]) for i in members}
        pending = [world.broadcast(_present(buffers[i]), src=owners[i]) for i in members]
        for work in pending:
            if work is not None:
                work.wait()
        for i in members:
            yield Result(i, _present(buffers[i]), seconds if i == mine else 0.0)


def _compute_agreed(
    jobs: Sequence[Job], mine: int | None, world: World, prepared: dict[int, Any]
) -> tuple[Tensor | None, float]:
    """Do this process's job; every process raises if one failed, so that none waits for ever."""
    start, values, failure = time.perf_counter(), None, None
    try:
        values = None if mine is None else jobs[mine].compute(prepared[mine]).to(jobs[mine].dtype)
    except NonFiniteError as error:
        failure = error
    seconds = time.perf_counter() - start
    failed = torch.tensor([0 if failure is None or mine is None else mine + 1], device=jobs[0].like.device)
    world.all_reduce(failed, op="max")
    if failure is not None:
        raise failure
    if world.size > 1 and int(failed) > 0:
        raise NonFiniteError(
            f"{jobs[int(failed) - 1].name}: no SVD on the process that had to do it; see its log."
        )
    return values, seconds


def _empty(job: Job) -> Tensor:
    return torch.empty(job.size, dtype=job.dtype, device=job.like.device)


def _present(values: Tensor | None) -> Tensor:
    assert values is not None
    return values
