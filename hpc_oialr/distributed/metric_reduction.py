"""Metrics of an update reduced over all ranks beside the training step, over MPI or torch.

Vectors are combined by the largest value of each slot, which gives the same bits in any order, on any library and
number of ranks; sums would not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hpc_oialr.distributed.environment import under_mpi
from hpc_oialr.distributed.failures import lost, reported
from hpc_oialr.distributed.mpi import join_mpi, leave_mpi_at_exit, library_name
from hpc_oialr.distributed.world import World
from hpc_oialr.errors import WorldError

log = logging.getLogger(__name__)

_NOT_MPI = "not started by MPI"
_WHAT = "the metrics' all-reduce over MPI"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1e-5, 1e-3


@dataclass(frozen=True)
class PendingReduction:
    """A reduction under way: what it fills, and how to wait for it."""

    values: Tensor
    wait: Callable[[], object]

    def result(self) -> Tensor:
        """Wait for the largest values; float64, on the CPU. WorldError if another rank has died or does not answer."""
        self.wait()
        return self.values.cpu()


class MetricsChannel:
    """Finds the largest value of each slot of a vector over all ranks, while other work goes on.

    Over the World's own process group: its CPU backend, or the GPU's where the group has only NCCL. ``name``: "mpi", or
    the name of torch's backend, or "single".
    """

    def __init__(self, world: World) -> None:
        self.world = world
        on_cpu = world.size == 1 or "cpu:" in dist.get_backend_config(world.group)
        self.device = torch.device("cpu") if on_cpu else world.device
        self.name = "single" if world.size == 1 else str(dist.get_backend(world.group))

    def start(self, vector: Tensor) -> PendingReduction:
        """Begin one all-reduce of a copy of ``vector``: shape (slots,), float64, on the CPU, without NaN or -0.0.

        A collective call that returns at once; each rank sends at most ``16 slots`` bytes in a ring,
        ``8 slots log2 P`` in a tree.
        """
        values = vector.to(self.device, torch.float64, copy=True)
        pending = self.world.start_all_reduce(values, op="max")
        return PendingReduction(values, (lambda: None) if pending is None else pending.wait)

    def close(self) -> None:
        """Close the channel after a run that went well; never needed after an error."""


class MPIChannel(MetricsChannel):
    """Over a duplicate of MPI's communicator, so that no other message can be taken for one of these.

    Most MPI libraries move messages inside MPI calls only: the work is then done in
    :meth:`PendingReduction.result`, in microseconds once all others have come that far.
    """

    def __init__(self, mpi: Any, timeout_s: float) -> None:
        # MPI itself waits for ever.
        self.name, self.mpi, self.timeout_s = "mpi", mpi, timeout_s
        self.comm = mpi.COMM_WORLD.Dup()

    def start(self, vector: Tensor) -> PendingReduction:
        """``Iallreduce`` in place, on a copy."""
        values = vector.to("cpu", torch.float64, copy=True)
        with reported(_WHAT, self.comm.rank, self.comm.size):
            request = self.comm.Iallreduce(self.mpi.IN_PLACE, values.numpy(), op=self.mpi.MAX)
        return PendingReduction(values, lambda: self._wait(request))

    def _wait(self, request: Any) -> None:
        """Ask again and again, at most every millisecond: ``MPI_Wait`` has no timeout."""
        rank, size, start, pause = self.comm.rank, self.comm.size, time.monotonic(), _FIRST_PAUSE_S
        with reported(_WHAT, rank, size):
            while not request.Test():
                if time.monotonic() - start > self.timeout_s:
                    raise lost(_WHAT, rank, size, f"no answer within {self.timeout_s:g} s")
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)

    def close(self) -> None:
        """Let MPI end with the interpreter."""
        leave_mpi_at_exit()


@dataclass(frozen=True)
class MPIPlace:
    """A process as MPI counts it."""

    rank: int
    size: int
    library: str


def open_channel(world: World, environ: Mapping[str, str] | None = None) -> MetricsChannel:
    """MPI where mpirun or srun's MPI plugin started the processes and mpi4py is there; torch otherwise.

    A collective call; all ranks decide alike. mpi4py is imported, and MPI initialised, only in a job that MPI
    started. Without mpi4py there, one line in the log says how to get it. WorldError on all
    ranks, if MPI gives any of them another rank or size than the launcher.
    """
    found = world.all_gather_object(_place(world, environ))
    places = [place for place in found if isinstance(place, MPIPlace)]
    if len(places) == world.size:
        check_places(places, world)
        mpi = join_mpi()
        return MPIChannel(mpi, world.timeout_s)
    channel = MetricsChannel(world)
    reasons = [(rank, why) for rank, why in enumerate(found) if isinstance(why, str) and why != _NOT_MPI]
    if reasons and world.is_main:
        log.warning(
            "MPI started this run but rank %d cannot use it (%s); metrics go over %s. For the MPI channel: "
            'pip install "hpc_oialr[mpi]", beside an MPI library.',
            *reasons[0],
            channel.name,
        )
    return channel


def check_places(places: Sequence[MPIPlace], world: World) -> None:
    """Raise :class:`WorldError` unless rank i is MPI's rank i, of the same size."""
    for rank, place in enumerate(places):
        if (place.rank, place.size) != (rank, world.size):
            raise WorldError(
                f"{place.library} counts rank {rank} of {world.size} ({world.launcher}) as rank {place.rank} "
                f"of {place.size}; both must agree. The launcher and the MPI library speak different PMIs: start "
                "Open MPI with srun --mpi=pmix, MPICH or Intel MPI with srun --mpi=pmi2, or use the library's "
                "own mpirun; srun --mpi=none does without MPI."
            )


def _place(world: World, environ: Mapping[str, str] | None) -> MPIPlace | str:
    """This process's place in MPI, or why there is none."""
    if world.size == 1 or world.launcher == "adopted" or not under_mpi(environ):
        return _NOT_MPI
    try:
        mpi = join_mpi(environ)
    except (ImportError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return MPIPlace(mpi.COMM_WORLD.rank, mpi.COMM_WORLD.size, library_name(mpi))
