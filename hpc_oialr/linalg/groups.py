"""Communicators over torch.distributed and mpi4py, and the one for whatever names a group of processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hpc_oialr.errors import ProcessLostError
from hpc_oialr.linalg.communicator import Communicator, Group, SingleCommunicator

# MPI 3 counts in 32-bit integers; longer messages go in pieces.
PIECE_BYTES = 1 << 30
TAG = 8505


def communicator(group: Group) -> Communicator:
    """The communicator for whatever names a group.

    Parameters
    ----------
    group
        None (one process), a :class:`Communicator`, a ``torch.distributed`` process group, or an mpi4py
        communicator.

    Raises
    ------
    TypeError
        For anything else.

    Examples
    --------
    >>> communicator(None).size
    1
    """
    if isinstance(group, Communicator):
        return group
    if group is None:
        return SingleCommunicator()
    if isinstance(group, dist.ProcessGroup):
        return TorchCommunicator(group)
    if type(group).__module__.split(".")[0] == "mpi4py":
        return MPICommunicator(group)
    raise TypeError(
        f"group is a {type(group).__name__}; must be None, a torch.distributed.ProcessGroup, an mpi4py "
        "communicator or a Communicator. For one process pass None."
    )


class TorchCommunicator(Communicator):
    """gloo for CPU tensors, NCCL for CUDA tensors, whatever the group was made with.

    Raises
    ------
    ProcessLostError
        From every call, if the other process has died or does not answer within the group's timeout.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self._group = group

    def _send(self, tensor: Tensor, to: int) -> None:
        with self._reported(f"sending to process {to}"):
            dist.send(tensor, group=self._group, group_dst=to)

    def _receive(self, out: Tensor, source: int) -> None:
        with self._reported(f"receiving from process {source}"):
            dist.recv(out, group=self._group, group_src=source)

    def _swap(self, tensor: Tensor, to: int, out: Tensor, source: int) -> None:
        with self._reported(f"an exchange with processes {to} and {source}"):
            # NCCL deadlocks on two plain calls: both directions must be enqueued as one batch.
            ops = [
                dist.P2POp(dist.isend, tensor, group=self._group, group_peer=to),
                dist.P2POp(dist.irecv, out, group=self._group, group_peer=source),
            ]
            for work in dist.batch_isend_irecv(ops):
                work.wait()

    @contextlib.contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ProcessLostError(
                f"process {self.rank} of {self.size}: {what} failed; every process of the group must call the "
                f"same function within the timeout. Another one has died or left: see its log. ({error})"
            ) from error


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


def _host(out: Tensor) -> Tensor:
    return out if out.device.type == "cpu" else torch.empty_like(out, device="cpu")


def _bring_back(host: Tensor, out: Tensor) -> None:
    if host is not out:
        out.copy_(host)


def _pieces(tensor: Tensor) -> list[Any]:
    """The tensor's bytes, as numpy views that MPI can read and fill; any dtype."""
    flat = tensor.view(-1).view(torch.uint8)
    return [piece.numpy() for piece in flat.split(PIECE_BYTES)]
