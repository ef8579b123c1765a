"""Reduce metrics of an update over all ranks beside the training step, over MPI or torch.

The reduction is the maximum of each slot: the same bits in any order, with any library and number of ranks.
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
from hpc_oialr.distributed.mpi import join_mpi, leave_mpi_at_exit, library_name
from hpc_oialr.distributed.world import World
from hpc_oialr.errors import WorldError

log = logging.getLogger(__name__)

_NOT_MPI = "not started by MPI"
_WHAT = "the metrics' all-reduce over MPI"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1e-5, 1e-3


@dataclass(frozen=True)
class PendingReduction:
    """A reduction under way: its buffer, and how to wait for it."""

    values: Tensor
    wait: Callable[[], object]

    def result(self) -> Tensor:
        """Wait for the largest values; float64, on the CPU. WorldError if another rank has died or does not answer."""
        self.wait()
        return self.values.cpu()


class MetricsChannel:
    """Maximum of each slot of a vector over all ranks, asynchronously.

    Uses the World's process group: its CPU backend, or NCCL if the group has no other. ``name``: "mpi", torch's backend,
    or "single".
    """

    def __init__(self, world: World) -> None:
        self.world = world
        on_cpu = world.size == 1 or "cpu:" in dist.get_backend_config(world.group)
        self.device = torch.device("cpu") if on_cpu else world.device
        self.name = "single" if world.size == 1 else str(dist.get_backend(world.group))

    def start(self, vector: Tensor) -> PendingReduction:
        """Start one all-reduce of a copy of ``vector``: shape (slots,), float64, on the CPU, without NaN or -0.0.

        A collective call that returns at once; a rank sends at most ``16 slots`` bytes in a ring, ``8 slots log2 P`` in a
        tree.
        """
        values = vector.to(self.device, torch.float64, copy=True)
        pending = self.world.start_all_reduce(values, op="max")
        return PendingReduction(values, (lambda: None) if pending is None else pending.wait)

    def close(self) -> None:
        """Close the channel after a run that went well; never needed after an error."""


class MPIChannel(MetricsChannel):
    """Over a duplicate of MPI's communicator, so that no message is confused with others.

    Most MPI libraries move messages inside MPI calls only, so the work is done in :meth:`PendingReduction.result`.
    """

    def __init__(self, world: World, mpi: Any) -> None:
        self.name, self.world, self.mpi = "mpi", world, mpi
        self.comm = mpi.COMM_WORLD.Dup()

    def start(self, vector: Tensor) -> PendingReduction:
        """``Iallreduce`` in place, on a copy."""
        values = vector.to("cpu", torch.float64, copy=True)
        with self.world.reported(_WHAT):
            request = self.comm.Iallreduce(self.mpi.IN_PLACE, values.numpy(), op=self.mpi.MAX)
        return PendingReduction(values, lambda: self._wait(request))

    def _wait(self, request: Any) -> None:
        """Poll, at least every millisecond: ``MPI_Wait`` has no timeout."""
        start, pause, timeout_s = time.monotonic(), _FIRST_PAUSE_S, self.world.timeout_s
        with self.world.reported(_WHAT):
            while not request.Test():
                if time.monotonic() - start > timeout_s:
                    raise self.world.lost(_WHAT, f"no answer within {timeout_s:g} s")
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)

    def close(self) -> None:
        """Let MPI end with the interpreter."""
        leave_mpi_at_exit()


@dataclass(frozen=True)
class MPIPlace:
    """A process's rank in MPI."""

    rank: int
    size: int
    library: str


def open_channel(world: World, environ: Mapping[str, str] | None = None) -> MetricsChannel:
    """MPI where mpirun or srun's MPI plugin started the processes and mpi4py is installed; torch otherwise.

    A collective call. mpi4py is imported, and MPI initialised, only in a job that MPI started; one line in the log says
    how to get it. WorldError on all ranks if MPI gives any of them another rank or size than the launcher.
    """
    found = world.all_gather_object(_place(world, environ))
    places = [place for place in found if isinstance(place, MPIPlace)]
    if len(places) == world.size:
        check_places(places, world)
        return MPIChannel(world, join_mpi())
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
    """This process's rank in MPI, or why it has none."""
    if world.size == 1 or world.launcher == "adopted" or not under_mpi(environ):
        return _NOT_MPI
    try:
        mpi = join_mpi(environ)
    except (ImportError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return MPIPlace(mpi.COMM_WORLD.rank, mpi.COMM_WORLD.size, library_name(mpi))
