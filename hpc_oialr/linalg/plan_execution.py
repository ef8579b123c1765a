"""Run the tasks of a work plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hpc_oialr.linalg.communicator import Communicator, Group, SubCommunicator
from hpc_oialr.linalg.distributed_svd import distributed_svd
from hpc_oialr.linalg.groups import communicator
from hpc_oialr.linalg.row_partition import block_of, even_blocks
from hpc_oialr.linalg.svd import SVD, compute_dtype, svd
from hpc_oialr.linalg.work_plan import Task, WorkPlan


class Factorised(NamedTuple):
    """A layer's index in the plan and its thin SVD, whole."""

    layer: int
    svd: SVD


def run_task(
    task: Task, plan: WorkPlan, matrix: Callable[[int], Tensor], group: Group = None, *, careful: bool = True
) -> Iterator[Factorised]:
    """Factorise the layers of one task; to be called by each of its processes.

    Parameters
    ----------
    matrix
        A layer's whole matrix by its index (m x n); each process has all of them, as in data-parallel
        training.
    group
        See :func:`~hpc_oialr.linalg.communicator.communicator`; of ``plan.processes``.
    careful
        As in :func:`~hpc_oialr.linalg.svd.svd`.

    Yields
    ------
    Factorised
        A layer shared by several processes comes out on the first of them only.

    Raises
    ------
    NonFiniteError
        On the processes that factorise a matrix with NaN or Inf.

    Notes
    -----
    Messages for shared layers only: those of a distributed SVD, and ``m k`` numbers in all to gather U.
    """
    if len(task.processes) > 1:
        return _shared(task, matrix, communicator(group), plan)
    return _batch(task, matrix, plan, careful)


def _batch(
    task: Task, matrix: Callable[[int], Tensor], plan: WorkPlan, careful: bool
) -> Iterator[Factorised]:
    """One batched call on a GPU, where it fills the device; a loop elsewhere, or if the call fails."""
    matrices = [matrix(i) for i in task.layers]
    if len(matrices) > 1 and matrices[0].is_cuda:
        stack = torch.stack(matrices).to(compute_dtype(matrices[0].dtype))
        if not careful or bool(torch.isfinite(stack).all()):
            results = torch.linalg.svd(stack, full_matrices=False)
            if not careful or all(bool(torch.isfinite(part).all()) for part in results):
                yield from (
                    Factorised(i, SVD(*parts)) for i, *parts in zip(task.layers, *results, strict=True)
                )
                return
    for i, A in zip(task.layers, matrices, strict=True):
        yield Factorised(i, svd(A, name=plan.layers[i].name, careful=careful))


def _shared(
    task: Task, matrix: Callable[[int], Tensor], comm: Communicator, plan: WorkPlan
) -> Iterator[Factorised]:
    """The long side is cut into blocks, so that every member has rows of a tall matrix."""
    team, name = SubCommunicator(comm, task.processes), plan.layers[task.layers[0]].name
    A = matrix(task.layers[0])
    tall = A if A.shape[0] >= A.shape[1] else A.mT
    rows = even_blocks(tall.shape[0], team.size)
    mine = tall[block_of(tall.shape[0], team.size, team.rank)]
    U, s, Vh, _ = distributed_svd(mine, team, name=name)
    if team.rank:
        team.send(U, 0)
        return
    others = [team.receive(U.new_empty(count, U.shape[1]), rank) for rank, count in enumerate(rows) if rank]
    whole = torch.cat([U, *others])
    yield Factorised(task.layers[0], SVD(whole, s, Vh) if tall is A else SVD(Vh.mT, s, whole.mT))
