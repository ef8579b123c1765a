"""Rank, device, process group and collectives of a run in one object."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hpc_oialr.distributed.devices import choose_device, group_device
from hpc_oialr.distributed.environment import LaunchInfo, gpus_per_node, launch_info, node_name
from hpc_oialr.distributed.failures import configure_nccl_watchdog, reported
from hpc_oialr.distributed.rendezvous import rendezvous_store
from hpc_oialr.errors import WorldError

Op = Literal["sum", "max", "min"]
T = TypeVar("T")
_SETTLING_S = 0.2
_CPU = torch.device("cpu")
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


@dataclass(frozen=True)
class Pending:
    """A collective under way; what it fills must not be used before :meth:`wait` has returned."""

    world: World
    what: str
    work: dist.Work

    def wait(self) -> None:
        """Wait for it.

        Raises
        ------
        WorldError
            If another process has died or does not answer within the timeout.
        """
        with self.world.reported(self.what):
            self.work.wait()


@dataclass(frozen=True)
class World:
    """One process's view of the run.

    With one process every method returns at once and no process group exists.

    Attributes
    ----------
    rank, size
        This process and how many there are.
    local_rank, local_size
        The same among the processes of its node.
    device
        Where this process computes.
    launcher
        "single", "torchrun", "slurm", "mpi" or "adopted" (the group was there before).
    group
        Process group; None stands for one process.
    owns_group
        Whether :meth:`close` ends the group.
    timeout_s
        After this long without an answer a process counts as dead (s); the group's own, if it was made here.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = _CPU
    launcher: str = "single"
    group: dist.ProcessGroup | None = None
    owns_group: bool = False
    timeout_s: float = 600.0

    # -- making one ------------------------------------------------------------------------------

    @classmethod
    def single(cls, device: str | torch.device | None = None) -> World:
        """One process, whatever the launcher says; ``device`` defaults to a GPU if there is one."""
        return cls(device=choose_device(None if device is None else str(device), 0, 1, None))

    @classmethod
    def from_environment(
        cls,
        *,
        device: str | None = None,
        backend: str | None = None,
        timeout_s: float = 600.0,
        environ: Mapping[str, str] | None = None,
    ) -> World:
        """Join the processes that torchrun, srun or mpirun started; alone without one of them.

        Parameters
        ----------
        device
            "cpu" or "cuda"; default "cuda" if there is one. A GPU's index is the local rank, or 0
            where each process sees one only.
        backend
            torch.distributed backend; default gloo for CPU tensors and NCCL for CUDA tensors.
        timeout_s
            After this long without an answer a process counts as dead (s).
        environ
            Variables to read; default ``os.environ``.

        Raises
        ------
        WorldError
            If variables contradict each other, a GPU is missing, or the others cannot be reached.
        """
        info = launch_info(environ)
        place = choose_device(device, info.local_rank, info.local_size, gpus_per_node(environ))
        if place.type == "cuda":
            torch.cuda.set_device(place)
        if info.size == 1:
            return cls(device=place, launcher=info.launcher, timeout_s=timeout_s)
        _join(info, place, backend, timeout_s)
        where = (info.rank, info.size, info.local_rank, info.local_size)
        return cls(*where, place, info.launcher, dist.group.WORLD, owns_group=True, timeout_s=timeout_s)

    @classmethod
    def current(cls, group: dist.ProcessGroup | None = None) -> World:
        """The processes of ``group``, or of the process group that exists already, or this one alone.

        A collective call where a group exists: processes tell each other their node's name.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls.single()
        group = group or dist.group.WORLD
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        device = group_device(group)
        if size == 1:
            return cls(device=device, launcher="adopted", group=None)
        nodes: list[Any] = [None] * size
        dist.all_gather_object(nodes, node_name(), group=group)
        local_rank, local_size = nodes[:rank].count(nodes[rank]), nodes.count(nodes[rank])
        return cls(rank, size, local_rank, local_size, device, "adopted", group)

    def within(self, group: dist.ProcessGroup) -> World:
        """The processes of a ``group`` that this one is in."""
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        return replace(self, rank=rank, size=size, group=group if size > 1 else None, owns_group=False)

    # -- talking to the others -------------------------------------------------------------------

    @property
    def is_main(self) -> bool:
        """Whether this is process 0, which alone writes and shows."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.any(False)

    def broadcast(self, tensor: Tensor, src: int) -> Pending | None:
        """Send ``tensor`` from process ``src`` into every other's; call ``wait()`` before using it.

        Returns
        -------
        Pending or None
            None for one process: nothing is to be waited for.
        """
        if self.size == 1:
            return None
        with self.reported("a broadcast"):
            work = dist.broadcast(tensor, group=self.group, group_src=src, async_op=True)
        return self._pending("a broadcast", work)

    def share(self, tensors: Iterable[Tensor], src: int = 0) -> None:
        """Send process ``src``'s values into every process's tensors, all under way at once; waits for them."""
        for pending in [self.broadcast(tensor, src=src) for tensor in tensors]:
            if pending is not None:
                pending.wait()

    def start_all_reduce(self, tensor: Tensor, op: Op = "sum") -> Pending | None:
        """:meth:`all_reduce` that goes on beside other work; None for one process.

        Every process must start it at the same place among its other collectives.
        """
        if self.size == 1:
            return None
        with self.reported("an all-reduce"):
            work = dist.all_reduce(tensor, op=_OPS[op], group=self.group, async_op=True)
        return self._pending("an all-reduce", work)

    def _pending(self, what: str, work: dist.Work | None) -> Pending:
        assert work is not None
        return Pending(self, what, work)

    def all_reduce(self, tensor: Tensor, op: Op = "sum") -> Tensor:
        """Reduce ``tensor`` over all processes, in place; the same bits on each.

        Raises
        ------
        WorldError
            If another process has died or does not answer within the timeout.
        """
        if self.size > 1:
            with self.reported("an all-reduce"):
                dist.all_reduce(tensor, op=_OPS[op], group=self.group)
        return tensor

    def all_gather_object(self, obj: T) -> list[T]:
        """Every process's object, in order of rank; small ones only, they travel as pickles."""
        if self.size == 1:
            return [obj]
        gathered: list[Any] = [None] * self.size
        with self.reported("an all-gather"):
            dist.all_gather_object(gathered, obj, group=self.group)
        return gathered

    def broadcast_object(self, obj: T, src: int = 0) -> T:
        """Process ``src``'s object; small ones only."""
        if self.size == 1:
            return obj
        box: list[Any] = [obj]
        with self.reported("a broadcast"):
            dist.broadcast_object_list(box, group=self.group, group_src=src)
        return box[0]  # type: ignore[no-any-return]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)], device=self.device)
        return bool(self.all_reduce(flags, op="max").item())

    def close(self) -> None:
        """End the process group if :meth:`from_environment` made it; may be called twice."""
        if self.owns_group and dist.is_initialized():
            # Gloo's threads let go of the last collective's tensors a moment after it has returned, and
            # need the interpreter for that; a group that is freed meanwhile waits for them for ever.
            time.sleep(_SETTLING_S)
            dist.destroy_process_group()

    def reported(self, what: str, *, only_communication: bool = False) -> AbstractContextManager[None]:
        """Context that turns a failed communication inside into a :class:`WorldError`.

        For what talks to the others without this class: a wrapper's backward pass, a checkpoint.

        Parameters
        ----------
        only_communication
            Let other RuntimeErrors through as they are.
        """
        return reported(what, self.rank, self.size, only_communication=only_communication)


def _join(info: LaunchInfo, device: torch.device, backend: str | None, timeout_s: float) -> None:
    on_gpu = device.type == "cuda"
    if on_gpu:
        configure_nccl_watchdog(os.environ, timeout_s)
    try:
        limit = timedelta(seconds=timeout_s)
        dist.init_process_group(
            backend or ("cpu:gloo,cuda:nccl" if on_gpu else "gloo"),
            store=rendezvous_store(info, limit),
            rank=info.rank,
            world_size=info.size,
            timeout=limit,
            device_id=device if on_gpu else None,
        )
    except (RuntimeError, ValueError, OSError) as error:
        ports = " or ".join(map(str, info.ports))
        raise WorldError(
            f"process {info.rank} of {info.size} ({info.launcher}) could not meet the others at {info.master_addr}:"
            f"{ports} within {timeout_s:g} s; all {info.size} must be started, and process 0 must be reachable there. "
            f"Check the other processes' logs; if the port is in use, set MASTER_PORT. ({error})"
        ) from error
