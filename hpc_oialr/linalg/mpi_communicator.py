"""A communicator over mpi4py, which is an optional extra."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpc_oialr.errors import MissingExtraError
from hpc_oialr.linalg.communicator import Communicator

# MPI 3 counts in 32-bit integers; longer messages go in pieces.
PIECE_BYTES = 1 << 30
TAG = 8505


class MPICommunicator(Communicator):
    """Blocking MPI point-to-point calls; CUDA tensors pass through host memory.

    Parameters
    ----------
    comm
        An ``mpi4py.MPI.Comm``, used with one tag of its own so that no other message is taken for ours.
    """

    def __init__(self, comm: Any) -> None:
        super().__init__(comm.Get_rank(), comm.Get_size())
        self._comm = comm

    def _send(self, tensor: Tensor, to: int) -> None:
        for piece in _pieces(tensor.cpu()):
            self._comm.Send(piece, dest=to, tag=TAG)

    def _receive(self, out: Tensor, source: int) -> None:
        host = _host(out)
        for piece in _pieces(host):
            self._comm.Recv(piece, source=source, tag=TAG)
        _bring_back(host, out)

    def _swap(self, tensor: Tensor, to: int, out: Tensor, source: int) -> None:
        host = _host(out)
        requests = [self._comm.Irecv(piece, source=source, tag=TAG) for piece in _pieces(host)]
        self._send(tensor, to)
        for request in requests:
            request.Wait()
        _bring_back(host, out)


def mpi_world() -> MPICommunicator:
    """All processes that mpirun or srun started.

    Raises
    ------
    MissingExtraError
        If mpi4py is not installed.
    """
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise MissingExtraError("mpi4py", "mpi", purpose="linear algebra over MPI") from error
    return MPICommunicator(MPI.COMM_WORLD)


def _host(out: Tensor) -> Tensor:
    return out if out.device.type == "cpu" else torch.empty_like(out, device="cpu")


def _bring_back(host: Tensor, out: Tensor) -> None:
    if host is not out:
        out.copy_(host)


def _pieces(tensor: Tensor) -> list[Any]:
    """The tensor's bytes, as numpy views that MPI can read and fill; any dtype."""
    flat = tensor.view(-1).view(torch.uint8)
    return [piece.numpy() for piece in flat.split(PIECE_BYTES)]
