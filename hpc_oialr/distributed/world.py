"""Rank, device, process group and collectives of a run in one object; failed communication as ProcessLostError."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hpc_oialr.distributed.environment import LaunchInfo, gpus_per_node, launch_info, node_name
from hpc_oialr.distributed.rendezvous import rendezvous_store
from hpc_oialr.errors import OIALRError, ProcessLostError, WorldError

Op = Literal["sum", "max", "min"]
T = TypeVar("T")
_SETTLING_S = 0.2
_CPU = torch.device("cpu")
# Gloo raises plain RuntimeErrors, with its source files in their text.
_COMMUNICATION = re.compile(r"gloo/|pair closure|ProcessGroup|NCCL|TCPStore|c10d|MPI_|[Cc]onnection (closed|reset)")
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


@dataclass(frozen=True)
class Pending:
    """A collective under way; its buffer must not be used before :meth:`wait` has returned."""

    world: World
    what: str
    work: dist.Work | None

    def wait(self) -> None:
        """Wait for it; raises WorldError if another rank has died or does not answer within the timeout."""
        assert self.work is not None
        with self.world.reported(self.what):
            self.work.wait()


@dataclass(frozen=True)
class World:
    """One rank's view of the run. With one rank every method returns at once and no process group exists.

    All collective calls raise WorldError if another rank has died or does not answer within the timeout.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the ranks of its node
    local_size: int = 1
    device: torch.device = _CPU  # where this rank computes
    # "torchrun", "slurm", "mpi", "submitit", or "adopted" (the group existed before)
    launcher: str = "single"
    group: dist.ProcessGroup | None = None  # None for one rank
    owns_group: bool = False  # whether close() ends the group
    timeout_s: float = 600.0  # after this long without an answer a rank counts as dead

    # -- making one ------------------------------------------------------------------------------

    @classmethod
    def single(cls, device: str | torch.device | None = None) -> World:
        """One rank, whatever the launcher says; ``device`` defaults to a GPU if there is one."""
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
        """Join the ranks that torchrun, srun or mpirun started; alone without one of them.

        ``device``: see :func:`choose_device`; ``backend`` of torch.distributed: by default gloo for tensors on the CPU
        and NCCL for those on a GPU. WorldError if variables contradict each other, a GPU is missing, or the others
        cannot be reached.
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
        """The ranks of ``group``, by default of the existing process group, or this one alone; a collective call."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls.single()
        group = group or dist.group.WORLD
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        # The group can send tensors on the GPU under NCCL, otherwise on the CPU.
        nccl = "nccl" in str(dist.get_backend_config(group))
        device = torch.device("cuda", torch.cuda.current_device()) if nccl else _CPU
        if size == 1:
            return cls(device=device, launcher="adopted", group=None)
        nodes: list[Any] = [None] * size
        dist.all_gather_object(nodes, node_name(), group=group)
        local_rank, local_size = nodes[:rank].count(nodes[rank]), nodes.count(nodes[rank])
        return cls(rank, size, local_rank, local_size, device, "adopted", group)

    def within(self, group: dist.ProcessGroup) -> World:
        """The ranks of a ``group`` with this rank."""
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        return replace(self, rank=rank, size=size, group=group if size > 1 else None, owns_group=False)

    # -- collectives -----------------------------------------------------------------------------

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any(False)

    def broadcast(self, tensor: Tensor, src: int) -> Pending | None:
        """Send ``tensor`` from rank ``src`` into every other's; ``wait()`` before using it. None for one rank."""
        if self.size == 1:
            return None
        with self.reported("a broadcast"):
            work = dist.broadcast(tensor, group=self.group, group_src=src, async_op=True)
        return Pending(self, "a broadcast", work)

    def share(self, tensors: Iterable[Tensor], src: int = 0) -> None:
        """Send rank ``src``'s values into every rank's tensors, all under way at once; waits for them."""
        for pending in [self.broadcast(tensor, src=src) for tensor in tensors]:
            if pending is not None:
                pending.wait()

    def start_all_reduce(self, tensor: Tensor, op: Op = "sum") -> Pending | None:
        """Asynchronous :meth:`all_reduce`, in the same order among other collectives on all ranks; None for one rank."""
        if self.size == 1:
            return None
        with self.reported("an all-reduce"):
            work = dist.all_reduce(tensor, op=_OPS[op], group=self.group, async_op=True)
        return Pending(self, "an all-reduce", work)

    def all_reduce(self, tensor: Tensor, op: Op = "sum") -> Tensor:
        """Reduce ``tensor`` over all ranks, in place; the same bits on each."""
        if self.size > 1:
            with self.reported("an all-reduce"):
                dist.all_reduce(tensor, op=_OPS[op], group=self.group)
        return tensor

    def all_gather_object(self, obj: T) -> list[T]:
        """Every rank's object, in order; small ones only, they travel as pickles."""
        if self.size == 1:
            return [obj]
        gathered: list[Any] = [None] * self.size
        with self.reported("an all-gather"):
            dist.all_gather_object(gathered, obj, group=self.group)
        return gathered

    def broadcast_object(self, obj: T, src: int = 0) -> T:
        """Rank ``src``'s object; small ones only."""
        if self.size == 1:
            return obj
        box: list[Any] = [obj]
        with self.reported("a broadcast"):
            dist.broadcast_object_list(box, group=self.group, group_src=src)
        return box[0]  # type: ignore[no-any-return]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)], device=self.device)
        return bool(self.all_reduce(flags, op="max").item())

    def close(self) -> None:
        """End the process group if :meth:`from_environment` made it; may be called twice."""
        if self.owns_group and dist.is_initialized():
            # Gloo's threads free the last collective's tensors a moment after it has returned, for which they need the
            # GIL; a group that is destroyed meanwhile would wait for them forever.
            time.sleep(_SETTLING_S)
            dist.destroy_process_group()

    @contextmanager
    def reported(self, what: str, *, only_communication: bool = False) -> Iterator[None]:
        """Turn a failed communication inside into a :class:`ProcessLostError` about ``what``, e.g. "an all-reduce".

        Also for collectives outside this class: a wrapper's backward pass, a checkpoint. ``only_communication``:
        RuntimeErrors whose text is not that of a communication library pass, for code that also computes.
        """
        try:
            yield
        except OIALRError:
            raise
        except RuntimeError as error:
            of_library = isinstance(error, dist.DistError) or _COMMUNICATION.search(str(error)) is not None
            if only_communication and not of_library:
                raise
            raise self.lost(what, str(error)) from error

    def lost(self, what: str, reason: str) -> ProcessLostError:
        """The error that ``what`` failed; ``reason`` is the message of the communication library."""
        return ProcessLostError(
            f"rank {self.rank} of {self.size}: {what} failed; every rank must take part within the timeout "
            f"(train.timeout_s). Another one has died or hangs: see its log, then resume from the last checkpoint. "
            f"({reason})"
        )


class AsyncFlagReduce:
    """A boolean reduced over all ranks asynchronously: set at one step, known at the next; at once for one rank.

    A step's flags are reduced while the next step computes, over gloo on the CPU: nothing waits for the GPU. All ranks
    read the same answer at the same step. Sends one 32-bit number a step.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        on_gpu = world.group is not None and "gloo" not in str(dist.get_backend_config(world.group))
        # The CPU, unless the group was made for GPUs only.
        self._device = world.device if on_gpu else _CPU
        self._under_way: tuple[Tensor, Pending] | None = None

    def exchange(self, flag: bool) -> bool:
        """Send this step's flag; return whether any rank had set it a step before; a collective call."""
        if self.world.size == 1:
            return flag
        answer = self.settle()
        word = torch.tensor([int(flag)], dtype=torch.int32, device=self._device)
        pending = self.world.start_all_reduce(word, op="max")
        assert pending is not None
        self._under_way = word, pending
        return answer

    def settle(self) -> bool:
        """The answer that is still under way, if one is."""
        if self._under_way is None:
            return False
        word, pending = self._under_way
        self._under_way = None
        pending.wait()
        return bool(word.item())


def choose_device(name: str | None, local_rank: int, local_size: int, gpus_of_node: int | None) -> torch.device:
    """The CPU, or the GPU with the local rank's index, or GPU 0 where each rank sees only its own.

    ``name``: "cpu", "cuda", "cuda:INDEX" (one rank only); None: "cuda" if there is one. ``gpus_of_node``: the job's GPUs
    on this node, if known. WorldError if there is no such device, or too few.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise WorldError(f"device is {name!r}; must be 'cpu', 'cuda' or 'cuda:INDEX'.")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise WorldError(
            f"device is {name!r} but torch {torch.__version__} sees no GPU; one must be visible. "
            "Use 'cpu', or install a CUDA build."
        )
    if ":" in name:
        if local_size > 1:
            raise WorldError(
                f"device is {name!r} with {local_size} ranks on this node; each must have its own. Use 'cuda'."
            )
        return device
    if gpus_of_node is not None and gpus_of_node < local_size:
        raise WorldError(
            f"{local_size} ranks share a node on which the job has {gpus_of_node} GPUs; each must have "
            "its own. Correct --gpus-per-node or --ntasks-per-node."
        )
    visible = torch.cuda.device_count()
    if visible != 1 and local_rank >= visible:
        raise WorldError(
            f"local rank {local_rank} of {local_size} has no GPU: {visible} are visible; each must have its "
            "own. Start fewer processes per node, or ask for --gpus-per-node as many."
        )
    return torch.device("cuda", 0 if visible == 1 else local_rank)


def _join(info: LaunchInfo, device: torch.device, backend: str | None, timeout_s: float) -> None:
    on_gpu = device.type == "cuda"
    if on_gpu:
        configure_nccl_watchdog(os.environ, timeout_s)
    limit = timedelta(seconds=timeout_s)
    try:
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
            f"rank {info.rank} of {info.size} ({info.launcher}) could not meet the others at {info.master_addr}:"
            f"{ports} within {timeout_s:g} s; all {info.size} must be started, and rank 0 must be reachable there. "
            f"Check the other ranks' logs; if the port is in use, set MASTER_PORT. ({error})"
        ) from error


def configure_nccl_watchdog(environ: MutableMapping[str, str], timeout_s: float) -> None:
    """Set what torch's NCCL watchdog reads when a group is made; the user's settings are kept.

    A collective that takes longer than the group's timeout ends the process. Should the watchdog itself hang inside CUDA,
    a monitor ends the process after the timeout, at least a minute. Nothing is dumped first, since that waits for the
    other ranks. See "PYTORCH ProcessGroupNCCL Environment Variables" in PyTorch's documentation.
    """
    # 3: the process ends without destroying the communicators, which may wait for the dead peer: that has blocked whole
    # jobs for hours.
    environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "1")
    environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(max(60, round(timeout_s))))
    environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
