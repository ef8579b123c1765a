"""Which metrics channel a run gets, and whether MPI counts the processes as the launcher does."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpc_oialr.errors import WorldError
from hpc_oialr.processes.environment import under_mpi
from hpc_oialr.processes.metrics_channel import MetricsChannel, TorchChannel
from hpc_oialr.processes.mpi import join_mpi, library_name
from hpc_oialr.processes.mpi_channel import MPIChannel
from hpc_oialr.processes.world import World

log = logging.getLogger(__name__)

_NOT_MPI = "not started by MPI"


@dataclass(frozen=True)
class MPIPlace:
    """A process as MPI counts it."""

    rank: int
    size: int
    library: str


def open_channel(world: World, environ: Mapping[str, str] | None = None) -> MetricsChannel:
    """MPI where mpirun or srun's MPI plugin started the processes and mpi4py is there; torch otherwise.

    A collective call. mpi4py is imported, and MPI initialised, only in a job that MPI started. Without
    mpi4py there, one line in the log says how to get it. All processes decide alike.

    Parameters
    ----------
    world
        The processes.
    environ
        Variables to read; default ``os.environ``.

    Raises
    ------
    WorldError
        On all processes, if MPI gives any of them another rank or size than the launcher.
    """
    found = world.all_gather_object(_look(world, environ))
    places = [place for place in found if isinstance(place, MPIPlace)]
    if len(places) == world.size:
        check_places(places, world)
        mpi = join_mpi()
        return MPIChannel(mpi, mpi.COMM_WORLD, world.timeout_s)
    _say_why(found, world)
    return TorchChannel(world)


def check_places(places: Sequence[MPIPlace], world: World) -> None:
    """Raise :class:`WorldError` unless process i is MPI's rank i, of the same size."""
    for rank, place in enumerate(places):
        if (place.rank, place.size) != (rank, world.size):
            raise WorldError(
                f"{place.library} counts process {rank} of {world.size} ({world.launcher}) as rank {place.rank} "
                f"of {place.size}; both must agree. The launcher and the MPI library speak different PMIs: start "
                "Open MPI with srun --mpi=pmix, MPICH or Intel MPI with srun --mpi=pmi2, or use the library's "
                "own mpirun; srun --mpi=none does without MPI."
            )


def _look(world: World, environ: Mapping[str, str] | None) -> MPIPlace | str:
    """This process's place in MPI, or why there is none."""
    if world.size == 1 or world.launcher == "adopted" or not under_mpi(environ):
        return _NOT_MPI
    try:
        mpi = join_mpi(environ)
    except (ImportError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return MPIPlace(mpi.COMM_WORLD.rank, mpi.COMM_WORLD.size, library_name(mpi))


def _say_why(found: Sequence[MPIPlace | str], world: World) -> None:
    reasons = [(rank, why) for rank, why in enumerate(found) if isinstance(why, str) and why != _NOT_MPI]
    if reasons and world.is_main:
        log.warning(
            "MPI started this run but process %d cannot use it (%s); metrics go over %s. For the MPI channel: "
            'pip install "hpc_oialr[mpi]", beside an MPI library.',
            *reasons[0],
            TorchChannel(world).name,
        )
