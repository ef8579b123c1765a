"""Results for the messages that torch's fake process group cannot stand in for."""

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
from hpc_oialr.plan.fake_tensors import replaced


@contextmanager
def fake_collectives() -> Iterator[None]:
    """Context in which no call waits for another process.

    Messages of TSQR carry sizes, so its results are made up in the right shapes, and a matrix that several
    processes would share is factorised by the first of them alone. Other messages between two processes are zero.
    """
    with replaced(
        (dist, "all_to_all_single", _exchange_zeros),
        (TorchCommunicator, "_receive", lambda self, out, source: out.zero_()),
        (factorising, "split_svd", _fake_svd),
        # As if the columns were orthonormal.
        (basis, "tsqr", lambda A, group=None: BlockQR(A, torch.eye(A.shape[1], dtype=A.dtype))),
        (dealing, "run_task", _run_on_first),
        # Bases that another process would have sent are zero here.
        (oialr, "require_own_bases", lambda *_: None),
    ):
        yield


def _exchange_zeros(
    out: Tensor, given: Tensor, out_sizes: Sequence[int], given_sizes: Sequence[int], group: Any = None
) -> None:
    size = dist.get_world_size(group)
    assert len(out_sizes) == len(given_sizes) == size
    assert (sum(out_sizes), sum(given_sizes)) == (out.numel(), given.numel())
    out.zero_()


def _fake_svd(site: Site, engine: Engine) -> tuple[Tensor, Tensor, Tensor]:
    """This process's rows and columns of two identities, and singular values from 2 down to 1."""
    engine.open(site)
    (m, n), k, layout = site.shape, site.k, engine.layout
    U, Vh = torch.eye(m, k)[layout.own_rows(m)], torch.eye(k, n)[:, layout.own_columns(n)]
    return U, torch.linspace(2.0, 1.0, k), Vh


def _run_on_first(
    task: Task, plan: WorkPlan, matrix: Callable[[int], Tensor], group: Any = None, *, careful: bool = True
) -> Iterator[Factorised]:
    if len(task.processes) > 1 and dist.get_rank(group) != task.processes[0]:
        return iter(())
    return run_task(replace(task, processes=task.processes[:1]), plan, matrix, careful=careful)
