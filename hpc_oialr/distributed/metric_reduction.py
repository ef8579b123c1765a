"""Metrics of an update reduced over all processes beside the training step: layout, channels, choice of channel.

Each process packs what it knows into one float64 vector: fields of every layer, and fields of every process. A slot
that it does not know is -inf. Vectors are combined by the largest value of each slot. The largest of some numbers is
one of them, whatever the order in which they are compared, so that MPI, gloo and any number of processes give the
same bits; sums would not.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
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

Values = Mapping[str, float]
_UNKNOWN = -math.inf
_NOT_MPI = "not started by MPI"
_WHAT = "the metrics' all-reduce over MPI"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1e-5, 1e-3


# -- layout of the vector ------------------------------------------------------------------------


@dataclass(frozen=True)
class Gathered:
    """What all processes together know; NaN where nobody knew a number.

    Attributes
    ----------
    layers
        Each layer's fields.
    processes
        Each process's fields, in order of rank.
    """

    layers: dict[str, dict[str, float]]
    processes: list[dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class MetricsLayout:
    """Names to slots and back; must be equal on all processes.

    The vector has ``L F + P G`` slots: each of L layers' F fields, then each of P processes' G fields;
    8 bytes a slot.

    Attributes
    ----------
    layers, layer_fields, process_fields
        Names, in order.
    processes
        How many.
    """

    layers: tuple[str, ...]
    layer_fields: tuple[str, ...]
    process_fields: tuple[str, ...]
    processes: int

    @property
    def size(self) -> int:
        """Slots of the vector."""
        return len(self.layers) * len(self.layer_fields) + self.processes * len(self.process_fields)

    def pack(self, rank: int, layers: Mapping[str, Values], own: Values) -> Tensor:
        """This process's part, of shape (size,), float64, CPU.

        Parameters
        ----------
        layers
            The fields of the layers that this process worked on; NaN stands for a number that is not
            there. Where several processes worked on one layer, the largest number counts.
        own
            The fields of process ``rank``.
        """
        fields = [_values(layers.get(name), self.layer_fields) for name in self.layers]
        rows = [_values(own if i == rank else None, self.process_fields) for i in range(self.processes)]
        flat = [value for row in fields + rows for value in row]
        # Of 0.0 and -0.0 either may count as the larger one; adding zero leaves 0.0 only.
        return torch.tensor(flat, dtype=torch.float64) + 0.0

    def unpack(self, largest: Tensor) -> Gathered:
        """Names and values of the largest of all processes' vectors.

        Parameters
        ----------
        largest
            Shape (size,), float64.

        Raises
        ------
        WorldError
            If no process knew anything of a layer or of a process.
        """
        assert largest.shape == (self.size,)
        values, cut = largest.tolist(), len(self.layers) * len(self.layer_fields)
        layers = dict(zip(self.layers, _rows(values[:cut], self.layer_fields), strict=True))
        processes = _rows(values[cut:], self.process_fields)
        for name, row in (*layers.items(), *((f"process {i}", row) for i, row in enumerate(processes))):
            _check_known(name, row)
        return Gathered(layers, processes)


def _values(given: Values | None, fields: tuple[str, ...]) -> list[float]:
    if given is None:
        return [_UNKNOWN] * len(fields)
    values = [float(given[field]) for field in fields]
    return [_UNKNOWN if math.isnan(value) else value for value in values]


def _rows(values: list[float], fields: tuple[str, ...]) -> list[dict[str, float]]:
    known = [math.nan if value == _UNKNOWN else value for value in values]
    rows = [known[i : i + len(fields)] for i in range(0, len(known), max(1, len(fields)))]
    return [dict(zip(fields, row, strict=True)) for row in rows]


def _check_known(name: str, row: dict[str, float]) -> None:
    if row and all(math.isnan(value) for value in row.values()):
        raise WorldError(
            f"no process told the metrics of {name!r}; at least one must, the one that computed its SVD. Every "
            "process must report the same layers, in the same order."
        )


# -- channels ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PendingReduction:
    """A reduction under way: what it fills, and how to wait for it."""

    values: Tensor
    wait: Callable[[], object]

    def result(self) -> Tensor:
        """Wait for the largest values; float64, on the CPU, of the shape of what was sent.

        Raises
        ------
        WorldError
            If another process has died or does not answer within the timeout.
        """
        self.wait()
        return self.values.cpu()


class MetricsChannel(ABC):
    """Finds the largest value of each slot of a vector over all processes, while other work goes on.

    The same bits over every channel, if no slot is NaN and none -0.0; :class:`MetricsLayout` makes such vectors.

    Attributes
    ----------
    name
        "mpi", or the name of torch's backend, or "single".
    """

    name: str

    @abstractmethod
    def start(self, vector: Tensor) -> PendingReduction:
        """Begin one all-reduce of ``vector``, of shape (slots,), float64, on the CPU.

        A collective call that returns at once; each process sends at most ``16 slots`` bytes in a ring,
        ``8 slots log2 P`` in a tree. ``vector`` is copied.
        """

    def close(self) -> None:
        """Let go of the channel after a run that went well; never needed after an error."""
        return


class TorchChannel(MetricsChannel):
    """Over the World's own process group; alone, over nothing.

    Parameters
    ----------
    world
        The processes. Their CPU backend is used; a group that has none, NCCL alone, sends through the
        GPU.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        on_cpu = world.size == 1 or "cpu:" in dist.get_backend_config(world.group)
        self.device = torch.device("cpu") if on_cpu else world.device
        self.name = "single" if world.size == 1 else str(dist.get_backend(world.group))

    def start(self, vector: Tensor) -> PendingReduction:
        """``all_reduce(async_op=True)``."""
        values = vector.to(self.device, torch.float64, copy=True)
        pending = self.world.start_all_reduce(values, op="max")
        return PendingReduction(values, (lambda: None) if pending is None else pending.wait)


class MPIChannel(MetricsChannel):
    """Over a duplicate of an MPI communicator, so that no other message can be taken for one of these.

    Most MPI libraries move messages inside MPI calls only: the work is then done in
    :meth:`PendingReduction.result`, in microseconds once all others have come that far.

    Parameters
    ----------
    mpi
        The module ``mpi4py.MPI``.
    comm
        A communicator of all processes.
    timeout_s
        After this long without an answer a process counts as dead (s); MPI itself waits for ever.
    """

    name = "mpi"

    def __init__(self, mpi: Any, comm: Any, timeout_s: float) -> None:
        self.mpi, self.timeout_s = mpi, timeout_s
        self.comm = comm.Dup()

    def start(self, vector: Tensor) -> PendingReduction:
        """``Iallreduce`` in place, on a copy."""
        values = vector.to("cpu", torch.float64, copy=True)
        with reported(_WHAT, self.comm.rank, self.comm.size):
            request = self.comm.Iallreduce(self.mpi.IN_PLACE, values.numpy(), op=self.mpi.MAX)
        return PendingReduction(values, lambda: self._wait(request))

    def _wait(self, request: Any) -> None:
        """Asks again and again, at most every millisecond: ``MPI_Wait`` knows no timeout."""
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


# -- which channel a run gets --------------------------------------------------------------------


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
    channel = TorchChannel(world)
    reasons = [(rank, why) for rank, why in enumerate(found) if isinstance(why, str) and why != _NOT_MPI]
    if reasons and world.is_main:
        log.warning(
            "MPI started this run but process %d cannot use it (%s); metrics go over %s. For the MPI channel: "
            'pip install "hpc_oialr[mpi]", beside an MPI library.',
            *reasons[0],
            channel.name,
        )
    return channel


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
