"""A session of one process among many that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from hpc_oialr import torch_compat
from hpc_oialr.data import DataConfig
from hpc_oialr.engines import Engine, EngineConfig
from hpc_oialr.errors import WorldError
from hpc_oialr.plan.subject import Blank, Subject
from hpc_oialr.processes import World
from hpc_oialr.processes.world import Op, Pending
from hpc_oialr.train.session import Session, make_session


class LonelyWorld(World):
    """The world of a process whose messages nobody answers: torch's fake process group.

    What another process would have sent is zero. Values that all have had from the beginning, by the run's seed,
    are left as they are.
    """

    def broadcast(self, tensor: Tensor, src: int) -> Pending | None:
        """As :class:`World`'s; zeros from others."""
        if src != self.rank:
            tensor.zero_()
        return super().broadcast(tensor, src)

    def start_all_reduce(self, tensor: Tensor, op: Op = "sum") -> Pending | None:
        """As :class:`World`'s; the others' part of a maximum is 0."""
        pending = super().start_all_reduce(tensor, op)
        if op == "max":
            tensor.clamp_(min=0)
        return pending

    def share(self, tensors: Any, src: int = 0) -> None:
        """As :class:`World`'s, without a change of values."""
        for tensor in tensors:
            super().broadcast(tensor, src)


@contextmanager
def imagined_world(rank: int, size: int) -> Iterator[World]:
    """A world of ``size`` processes, of which only ``rank`` is there; on the CPU.

    Raises
    ------
    WorldError
        If there is a process group already.
    """
    if size == 1:
        yield World(device=torch.device("cpu"))
        return
    if dist.is_initialized():
        raise WorldError(
            f"a process group of {dist.get_world_size()} processes exists; a plan imagines its own. Start oialr plan "
            "as one process, without torchrun, srun or mpirun."
        )
    # Registers the backend "fake".
    dist.init_process_group("fake", rank=rank, world_size=size, store=torch_compat.FakeStore())
    try:
        yield LonelyWorld(rank, size, 0, 1, torch.device("cpu"), "adopted", dist.group.WORLD, timeout_s=60.0)
    finally:
        dist.destroy_process_group()
        # What DTensor remembers of its operations refers to the groups of this world.
        torch_compat.forget_groups()


@dataclass(frozen=True)
class Ready:
    """An engine that exists, in the place of its settings; no recipe can choose it."""

    engine: Engine

    def build(self, world: World, precision: str) -> Engine:
        """The engine."""
        return self.engine


def imagined_session(subject: Subject, engine: Engine, batch: int) -> Session:
    """The session of a subject under ``engine``, with made-up data.

    Parameters
    ----------
    batch
        Samples of one process and step.
    """
    config, train = subject.config, subject.config.train
    global_batch = batch * engine.data.size
    # Long enough for any event of the method; nothing is trained to the end.
    steps = 10**9
    config = replace(
        config,
        data=cast(DataConfig, Blank(subject, global_batch)),
        engine=cast(EngineConfig, Ready(engine)),
        train=replace(
            train, global_batch=global_batch, steps=steps, workers=0, sync_batch_norm=False, device="cpu"
        ),
        compile=False,
    )
    with _default_dtype(torch.float64 if train.precision == "float64" else torch.float32):
        session = make_session(config, engine.world)
    session.scaler = torch.amp.GradScaler("cpu", enabled=False)
    return session


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
