"""The metrics' channel over MPI: one ``Iallreduce``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpc_oialr.processes.failures import lost, reported
from hpc_oialr.processes.metrics_channel import MetricsChannel, PendingReduction
from hpc_oialr.processes.mpi import leave_mpi_at_exit

_WHAT = "the metrics' all-reduce over MPI"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1e-5, 1e-3


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
        return _MPIReduction(values, request, self)

    def close(self) -> None:
        """Let MPI end with the interpreter."""
        leave_mpi_at_exit()


@dataclass(frozen=True)
class _MPIReduction(PendingReduction):
    values: Tensor
    request: Any
    channel: MPIChannel

    def result(self) -> Tensor:
        """Asks again and again, at most every millisecond: ``MPI_Wait`` knows no timeout."""
        comm, start, pause = self.channel.comm, time.monotonic(), _FIRST_PAUSE_S
        with reported(_WHAT, comm.rank, comm.size):
            while not self.request.Test():
                if time.monotonic() - start > self.channel.timeout_s:
                    raise lost(_WHAT, comm.rank, comm.size, f"no answer within {self.channel.timeout_s:g} s")
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
        return self.values
