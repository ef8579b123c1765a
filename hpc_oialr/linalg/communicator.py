"""Point-to-point calls and the collectives built on them, over torch.distributed, MPI or one process.

A backend provides two calls, ``_send`` and ``_swap``. Everything else is built on them here, in one fixed
order, so that a sum has the same bits over gloo, NCCL and MPI.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Op = Literal["sum", "max", "min"]
Group: TypeAlias = Any  # None, a Communicator, a torch ProcessGroup or an mpi4py communicator
_OPS: dict[Op, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}


class Communicator(ABC):
    """One process's end of a group.

    Attributes
    ----------
    rank, size
        This process and how many there are.
    bytes_sent
        Payload bytes this process has sent so far; set it to 0 to start anew.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.bytes_sent = rank, size, 0

    @abstractmethod
    def _send(self, tensor: Tensor, to: int) -> None: ...

    @abstractmethod
    def _receive(self, out: Tensor, source: int) -> None: ...

    @abstractmethod
    def _swap(self, tensor: Tensor, to: int, out: Tensor, source: int) -> None: ...

    # -- point to point: an empty tensor is no message, both ends know its shape -------------------

    def send(self, tensor: Tensor, to: int) -> None:
        """Send to process ``to``, which must call :meth:`receive`."""
        if tensor.numel():
            self.bytes_sent += tensor.nbytes
            self._send(tensor.detach().contiguous(), to)

    def receive(self, out: Tensor, source: int) -> Tensor:
        """Fill ``out``, contiguous and of the sender's shape and dtype."""
        if out.numel():
            self._receive(out, source)
        return out

    def swap(self, tensor: Tensor, to: int, out: Tensor, source: int) -> Tensor:
        """Send ``tensor`` to one process while ``out`` is filled by another (or the same) one."""
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
        """Process ``src``'s values, in place; at most ``ceil(log2 P)`` times the tensor sent by one process."""
        place = (self.rank - src) % self.size
        if place:
            self.receive(tensor, (parent(place) + src) % self.size)
        for child in reversed(children(place, self.size)):
            self.send(tensor, (child + src) % self.size)
        return tensor

    def all_reduce(self, tensor: Tensor, op: Op = "sum") -> Tensor:
        """A new tensor, the same bits on every process: partial results go up a binary tree and back."""
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        for child in children(self.rank, self.size):
            total = _OPS[op](total, self.receive(torch.empty_like(total), child))
        if self.rank:
            self.send(total, parent(self.rank))
        return self.broadcast(total)

    def all_to_all(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> list[Tensor]:
        """Send ``outgoing[p]`` to process p and fill ``incoming[p]`` from it; shapes may all differ."""
        received = list(incoming)
        received[self.rank].copy_(outgoing[self.rank])
        for step in range(1, self.size):
            to, source = (self.rank + step) % self.size, (self.rank - step) % self.size
            self.swap(outgoing[to], to, received[source], source)
        return received

    def reduce_scatter(self, outgoing: Sequence[Tensor]) -> Tensor:
        """The sum over processes of ``outgoing[rank]``, added in order of rank; each sends all but its own."""
        mine = outgoing[self.rank]
        parts = self.all_to_all(outgoing, [torch.empty_like(mine) for _ in range(self.size)])
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def all_gather_rows(self, block: Tensor, rows: Sequence[int]) -> Tensor:
        """All blocks stacked in order of rank; ``rows[p]`` is the height of process p's.

        A ring: each process sends (P - 1) / P of the result.
        """
        whole = block.new_empty(sum(rows), *block.shape[1:])
        parts = list(whole.split(list(rows)))
        parts[self.rank].copy_(block.detach())
        for step in range(self.size - 1):
            passed, wanted = (self.rank - step) % self.size, (self.rank - step - 1) % self.size
            right, left = (self.rank + 1) % self.size, (self.rank - 1) % self.size
            self.swap(parts[passed], right, parts[wanted], left)
        return whole


class SingleCommunicator(Communicator):
    """One process."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def _send(self, tensor: Tensor, to: int) -> None:
        raise AssertionError("a single process sends nothing")

    def _receive(self, out: Tensor, source: int) -> None:
        raise AssertionError("a single process sends nothing")

    def _swap(self, tensor: Tensor, to: int, out: Tensor, source: int) -> None:
        raise AssertionError("a single process sends nothing")


class SubCommunicator(Communicator):
    """Some processes of a group, renumbered 0, 1, ... in the given order; made without a message.

    Parameters
    ----------
    whole
        The group; bytes are counted there too.
    members
        Ranks in ``whole``; this process must be one of them.
    """

    def __init__(self, whole: Communicator, members: Sequence[int]) -> None:
        super().__init__(list(members).index(whole.rank), len(members))
        self.whole, self.members = whole, tuple(members)

    def _send(self, tensor: Tensor, to: int) -> None:
        self.whole.send(tensor, self.members[to])

    def _receive(self, out: Tensor, source: int) -> None:
        self.whole.receive(out, self.members[source])

    def _swap(self, tensor: Tensor, to: int, out: Tensor, source: int) -> None:
        self.whole.swap(tensor, self.members[to], out, self.members[source])


# -- the binary tree -------------------------------------------------------------------------------


def children(rank: int, size: int) -> list[int]:
    """Processes that report to ``rank``, nearest first: rank + 1, rank + 2, rank + 4, ...

    Examples
    --------
    >>> [children(rank, 6) for rank in range(6)]
    [[1, 2, 4], [], [3], [], [5], []]
    """
    found, distance = [], 1
    while rank % (2 * distance) == 0 and rank + distance < size:
        found.append(rank + distance)
        distance *= 2
    return found


def parent(rank: int) -> int:
    """The process ``rank`` > 0 reports to: its lowest set bit cleared."""
    return rank & (rank - 1)
