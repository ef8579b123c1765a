"""Point-to-point calls and the collectives built on them, over torch.distributed, MPI or one process.

A backend provides ``_send``, ``_receive`` and ``_swap``. Everything else is built on them here, in one fixed order, so
that a sum has the same bits over gloo, NCCL and MPI.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from hpc_oialr.errors import ProcessLostError

Op = Literal["sum", "max", "min"]
Group: TypeAlias = Any  # None, a Communicator, a torch ProcessGroup or an mpi4py communicator
_OPS: dict[Op, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}
# MPI 3 counts in 32-bit integers; longer messages go in pieces.
PIECE_BYTES = 1 << 30
TAG = 8505


def communicator(group: Group) -> Communicator:
    """The communicator of a group: None (one process), a torch process group, an mpi4py communicator, or one of ours."""
    if isinstance(group, Communicator):
        return group
    if group is None:
        return Communicator()
    if isinstance(group, dist.ProcessGroup):
        return TorchCommunicator(group)
    if type(group).__module__.split(".")[0] == "mpi4py":
        return MPICommunicator(group)
    raise TypeError(
        f"group is a {type(group).__name__}; must be None, a torch.distributed.ProcessGroup, an mpi4py "
        "communicator or a Communicator. For one process pass None."
    )


class Communicator:
    """One rank of a group; by itself a group of one process, which sends nothing."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.bytes_sent = 0  # payload of this rank so far

    def _send(self, tensor: Tensor, to: int) -> None:
        raise NotImplementedError

    def _receive(self, out: Tensor, source: int) -> None:
        raise NotImplementedError

    def _swap(self, tensor: Tensor, to: int, out: Tensor, source: int) -> None:
        raise NotImplementedError

    # -- point to point: an empty tensor is no message, both ends know its shape -------------------

    def send(self, tensor: Tensor, to: int) -> None:
        """Send to rank ``to``, which must call :meth:`receive`."""
        if tensor.numel():
            self.bytes_sent += tensor.nbytes
            self._send(tensor.detach().contiguous(), to)

    def receive(self, out: Tensor, source: int) -> Tensor:
        """Fill ``out``, contiguous and of the sender's shape and dtype."""
        if out.numel():
            self._receive(out, source)
        return out

    def swap(self, tensor: Tensor, to: int, out: Tensor, source: int) -> Tensor:
        """Send ``tensor`` to one rank while ``out`` is filled by another (or the same) one."""
        if not out.numel():
            self.send(tensor, to)
        elif not tensor.numel():
            self.receive(out, source)
        else:
            self.bytes_sent += tensor.nbytes
            self._swap(tensor.detach().contiguous(), to, out, source)
        return out

    # -- collectives -----------------------------------------------------------------------------

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Rank ``src``'s values, in place; a rank sends the tensor at most ``ceil(log2 P)`` times."""
        place = (self.rank - src) % self.size
        if place:
            self.receive(tensor, (parent(place) + src) % self.size)
        for child in reversed(children(place, self.size)):
            self.send(tensor, (child + src) % self.size)
        return tensor

    def all_reduce(self, tensor: Tensor, op: Op = "sum") -> Tensor:
        """A new tensor, the same bits on every rank: partial results go up a binary tree and back."""
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        for child in children(self.rank, self.size):
            total = _OPS[op](total, self.receive(torch.empty_like(total), child))
        if self.rank:
            self.send(total, parent(self.rank))
        return self.broadcast(total)

    def all_to_all(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> list[Tensor]:
        """Send ``outgoing[p]`` to rank p and fill ``incoming[p]`` from it; shapes may all differ."""
        received = list(incoming)
        received[self.rank].copy_(outgoing[self.rank])
        for step in range(1, self.size):
            to, source = (self.rank + step) % self.size, (self.rank - step) % self.size
            self.swap(outgoing[to], to, received[source], source)
        return received

    def reduce_scatter(self, outgoing: Sequence[Tensor]) -> Tensor:
        """The sum over ranks of ``outgoing[rank]``, added in order of rank; each sends all but its own."""
        mine = outgoing[self.rank]
        total, *parts = self.all_to_all(outgoing, [torch.empty_like(mine) for _ in range(self.size)])
        for part in parts:
            total = total + part
        return total

    def all_gather_rows(self, block: Tensor, rows: Sequence[int]) -> Tensor:
        """All blocks stacked in order of rank, ``rows[p]`` of rank p: a ring, each sends (P - 1) / P of the result."""
        whole = block.new_empty(sum(rows), *block.shape[1:])
        parts = list(whole.split(list(rows)))
        parts[self.rank].copy_(block.detach())
        right, left = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        for step in range(self.size - 1):
            passed, wanted = (self.rank - step) % self.size, (self.rank - step - 1) % self.size
            self.swap(parts[passed], right, parts[wanted], left)
        return whole


class TorchCommunicator(Communicator):
    """gloo for CPU tensors, NCCL for CUDA tensors, as the group has them.

    Calls raise :class:`ProcessLostError` if the other process has died or does not answer within the group's timeout.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self._group = group

    def _send(self, tensor: Tensor, to: int) -> None:
        with self._reported(f"sending to rank {to}"):
            dist.send(tensor, group=self._group, group_dst=to)

    def _receive(self, out: Tensor, source: int) -> None:
        with self._reported(f"receiving from rank {source}"):
            dist.recv(out, group=self._group, group_src=source)

    def _swap(self, tensor: Tensor, to: int, out: Tensor, source: int) -> None:
        with self._reported(f"an exchange with ranks {to} and {source}"):
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
                f"rank {self.rank} of {self.size}: {what} failed; every rank of the group must call the same "
                f"function within the timeout. Another one has died or left: see its log. ({error})"
            ) from error


class MPICommunicator(Communicator):
    """Blocking calls of an ``mpi4py.MPI.Comm``, with a tag of their own; CUDA tensors pass through host memory."""

    def __init__(self, comm: Any) -> None:
        super().__init__(comm.Get_rank(), comm.Get_size())
        self._comm = comm

    def _send(self, tensor: Tensor, to: int) -> None:
        for piece in _pieces(tensor.cpu()):
            self._comm.Send(piece, dest=to, tag=TAG)

    def _receive(self, out: Tensor, source: int) -> None:
        host = torch.empty_like(out, device="cpu") if out.is_cuda else out
        for piece in _pieces(host):
            self._comm.Recv(piece, source=source, tag=TAG)
        out.copy_(host)

    def _swap(self, tensor: Tensor, to: int, out: Tensor, source: int) -> None:
        host = torch.empty_like(out, device="cpu") if out.is_cuda else out
        requests = [self._comm.Irecv(piece, source=source, tag=TAG) for piece in _pieces(host)]
        self._send(tensor, to)
        for request in requests:
            request.Wait()
        out.copy_(host)


def _pieces(tensor: Tensor) -> list[Any]:
    """The tensor's bytes, as numpy views that MPI can read and fill; any dtype."""
    flat = tensor.view(-1).view(torch.uint8)
    return [piece.numpy() for piece in flat.split(PIECE_BYTES)]


# -- the binary tree -------------------------------------------------------------------------------


def children(rank: int, size: int) -> list[int]:
    """Ranks that report to ``rank``, nearest first: rank + 1, rank + 2, rank + 4, ...

    >>> [children(rank, 6) for rank in range(6)]
    [[1, 2, 4], [], [3], [], [5], []]
    """
    found, distance = [], 1
    while rank % (2 * distance) == 0 and rank + distance < size:
        found.append(rank + distance)
        distance *= 2
    return found


def parent(rank: int) -> int:
    """The rank to which ``rank`` > 0 reports: its lowest set bit cleared."""
    return rank & (rank - 1)
