"""Messages that torch's fake process group cannot stand in for, left out or made up in the right shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hpc_oialr.engines import Engine
from hpc_oialr.linalg.plan_execution import Factorised, run_task
from hpc_oialr.linalg.torch_communicator import TorchCommunicator
from hpc_oialr.linalg.tsqr import BlockQR
from hpc_oialr.linalg.work_plan import Task, WorkPlan
from hpc_oialr.lowrank import Site
from hpc_oialr.method import basis, dealing, factorising, oialr


@contextmanager
def lonely_linalg() -> Iterator[None]:
    """Context in which nobody waits for other processes.

    The messages of TSQR carry sizes, so that nothing can stand in for them: its result is made up, and a matrix
    that several processes would share is factorised whole by the first of them. What comes in other messages
    from one process to another is zero.
    """
    with (
        _replaced(dist, "all_to_all_single", _nothing_is_exchanged),
        _replaced(TorchCommunicator, "_receive", _nothing_comes),
        _replaced(factorising, "split_svd", _made_up_svd),
        _replaced(basis, "tsqr", _made_up_qr),
        _replaced(dealing, "run_task", _by_the_first),
        # Bases that another process would have sent are zero here.
        _replaced(oialr, "require_own_bases", lambda *_: None),
    ):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _nothing_comes(_: TorchCommunicator, out: Tensor, source: int) -> None:
    out.zero_()


def _nothing_is_exchanged(
    out: Tensor, given: Tensor, out_sizes: Sequence[int], given_sizes: Sequence[int], group: Any = None
) -> None:
    size = dist.get_world_size(group)
    assert len(out_sizes) == len(given_sizes) == size
    assert (sum(out_sizes), sum(given_sizes)) == (out.numel(), given.numel())
    out.zero_()


def _made_up_svd(site: Site, engine: Engine) -> tuple[Tensor, Tensor, Tensor]:
    """This process's rows and columns of two identities, and singular values from 2 down to 1."""
    engine.open(site)
    (m, n), k, layout = site.shape, site.k, engine.layout
    U, Vh = torch.eye(m, k)[layout.own_rows(m)], torch.eye(k, n)[:, layout.own_columns(n)]
    return U, torch.linspace(2.0, 1.0, k), Vh


def _made_up_qr(A: Tensor, group: Any = None) -> BlockQR:
    """As if the columns were orthonormal."""
    return BlockQR(A, torch.eye(A.shape[1], dtype=A.dtype))


def _by_the_first(
    task: Task, plan: WorkPlan, matrix: Callable[[int], Tensor], group: Any = None, *, careful: bool = True
) -> Iterator[Factorised]:
    if len(task.processes) > 1 and dist.get_rank(group) != task.processes[0]:
        return iter(())
    return run_task(replace(task, processes=task.processes[:1]), plan, matrix, careful=careful)
