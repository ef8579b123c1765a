"""Where the rows and columns of one weight are: replicated on every rank, or sharded over several."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from hpc_oialr.lowrank.kernel_modes import times


class Replicated:
    """Every rank has every matrix whole.

    The method asks a layout for blocks and gives blocks back, so that it is the same code for replicated and
    sharded matrices; here a block is the matrix. "Stored" is a parameter or a tensor of the optimizer's state.
    """

    group: dist.ProcessGroup | None = None  # over which a matrix is sharded

    def rows(self, weight: Tensor) -> Tensor:
        """This rank's rows of a stored weight, moment or ``U``: m_p x (all the rest); a view."""
        return self.local(weight).reshape(-1, weight.numel() // weight.shape[0])

    def columns(self, Vh: Tensor) -> Tensor:
        """This rank's columns of a stored ``Vh``: r x n_p."""
        return Vh.detach()

    def core(self, S: Tensor) -> Tensor:
        """A stored core or its moment, whole (r x r); a collective call where it is sharded."""
        return whole(S.detach())

    def put_rows(self, block: Tensor, m: int) -> Tensor:
        """The stored form of a matrix with ``m`` rows, of which ``block`` is this rank's part."""
        return block

    def put_columns(self, block: Tensor, n: int) -> Tensor:
        """The stored form of a matrix with ``n`` columns, of which ``block`` is this rank's part."""
        return block

    def put_core(self, S: Tensor) -> Tensor:
        """The stored form of a core that every rank has whole."""
        return S

    def put_bases(self, U: Tensor, Vh: Tensor, m: int, n: int) -> tuple[Tensor, Tensor]:
        """The stored form of a layer's bases, of which these are this rank's rows and columns."""
        return self.put_rows(U, m), self.put_columns(Vh, n)

    def own_rows(self, m: int) -> slice:
        """Which of ``m`` rows are this rank's."""
        return slice(0, m)

    def own_columns(self, n: int) -> slice:
        """Which of ``n`` columns are this rank's."""
        return self.own_rows(n)

    def whole_columns(self, block: Tensor, n: int) -> Tensor:
        """The whole matrix (r x n) of which each rank has its columns; a collective call."""
        return block

    def project(self, weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """``left^T weight right^T`` of a stored weight, whole; ``left`` is this rank's rows, ``right`` is whole.

        Of a kernel in Tucker form ``right`` is that of its channels, for all places alike.
        """
        return self.add(left.mT @ times(self.rows(weight).to(left.dtype), right.mT))

    def project_core(self, S: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """``left^T S right^T`` of a stored core, whole on every rank, as are ``left`` and ``right``."""
        return left.mT @ times(self.core(S).to(left.dtype), right.mT)

    def add(self, part: Tensor) -> Tensor:
        """The sum of all ranks' parts, in place."""
        return part

    def local(self, tensor: Tensor) -> Tensor:
        """What this rank stores of a tensor."""
        return local(tensor.detach())


REPLICATED = Replicated()


class Sharded(Replicated):
    """Matrices as DTensors: weights and ``U`` in row blocks, ``Vh`` in column blocks.

    Sharded over the last axis of the mesh, replicated along the others. Blocks are those of ``torch.chunk``: equal but
    for the last ones, which may be empty. With ``split_cores`` cores are stored in row blocks too, otherwise every rank
    has them whole. ``even_columns`` is FSDP2's rule: it shards columns only if all blocks are equal; a ``Vh`` with
    others is stored in row blocks. With ``whole_bases`` every rank stores ``U`` and ``Vh`` whole, as ordinary tensors,
    though it changes its own rows and columns only.

    Traffic of one rank: :meth:`core` r^2 numbers, :meth:`project` r^2 (an all-reduce), :meth:`whole_columns` r n (an
    all-gather), ``Vh`` in row blocks r n / P each way (an all-to-all), whole bases r (m + n) (two all-gathers).
    """

    def __init__(
        self, mesh: DeviceMesh, *, split_cores: bool = True, even_columns: bool = True, whole_bases: bool = False
    ) -> None:
        self.mesh, self.split_cores, self.even_columns, self.whole_bases = mesh, split_cores, even_columns, whole_bases
        self.group = mesh.get_group(mesh.ndim - 1)
        self.size, self.place = dist.get_world_size(self.group), dist.get_rank(self.group)

    def placements(self, dim: int) -> list[Replicate | Shard]:
        """Sharded along ``dim`` over the last axis of the mesh."""
        return [*[Replicate()] * (self.mesh.ndim - 1), Shard(dim)]

    def rows(self, weight: Tensor) -> Tensor:
        """Those of a whole ``U`` too."""
        block = super().rows(weight)
        return block[self.own_rows(len(block))] if self._is_whole(weight) else block

    def columns(self, Vh: Tensor) -> Tensor:
        """An all-to-all where ``Vh`` is stored in row blocks."""
        r, n = Vh.shape
        block = self.local(Vh)
        if self._is_whole(Vh):
            return block[:, self.own_columns(n)]
        if self._stores_columns(n):
            return block
        shapes = [(_length(rows), _length(self.own_columns(n))) for rows in self._chunks(r)]
        return torch.cat(self._exchange([block[:, columns] for columns in self._chunks(n)], shapes))

    def put_rows(self, block: Tensor, m: int) -> Tensor:
        """A DTensor of ``m`` rows."""
        return self.put(block, 0, (m, block.shape[1]))

    def put_columns(self, block: Tensor, n: int) -> Tensor:
        """A DTensor of ``n`` columns, in column blocks if they are equal or may be unequal."""
        r = block.shape[0]
        if self._stores_columns(n):
            return self.put(block, 1, (r, n))
        shapes = [(_length(self.own_rows(r)), _length(columns)) for columns in self._chunks(n)]
        pieces = self._exchange([block[rows] for rows in self._chunks(r)], shapes)
        return self.put(torch.cat(pieces, dim=1), 0, (r, n))

    def put_bases(self, U: Tensor, Vh: Tensor, m: int, n: int) -> tuple[Tensor, Tensor]:
        """Gathered where every rank stores them whole."""
        if not self.whole_bases:
            return super().put_bases(U, Vh, m, n)
        return self.put(U, 0, (m, U.shape[1])).full_tensor(), self.whole_columns(Vh, n)

    def _is_whole(self, basis: Tensor) -> bool:
        return self.whole_bases and not isinstance(basis, DTensor)

    def _stores_columns(self, n: int) -> bool:
        return not self.even_columns or n % self.size == 0

    def _chunks(self, length: int) -> list[slice]:
        return [chunk(length, self.size, place) for place in range(self.size)]

    def _exchange(self, sent: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        received = exchange([[piece] for piece in sent], [[shape] for shape in shapes], self.group, sent[0])
        return [piece for (piece,) in received]

    def put_core(self, S: Tensor) -> Tensor:
        """This rank's rows of it where cores are sharded."""
        return self.put(S[self.own_rows(S.shape[0])], 0, S.shape) if self.split_cores else S

    def put(self, block: Tensor, dim: int, shape: Sequence[int]) -> DTensor:
        """A contiguous tensor of any ``shape`` that is sharded along ``dim``, of which ``block`` is here."""
        block = block.contiguous()
        if block.untyped_storage().nbytes() > block.nbytes:
            # A view would keep the whole matrix alive.
            block = block.clone()
        stride = torch.empty(shape, device="meta").stride()
        placements = self.placements(dim)
        return DTensor.from_local(block, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)

    def own_rows(self, m: int) -> slice:
        """As ``torch.chunk`` cuts them."""
        return chunk(m, self.size, self.place)

    def whole_columns(self, block: Tensor, n: int) -> Tensor:
        """An all-gather of r n numbers."""
        return self.put(block, 1, (block.shape[0], n)).full_tensor()

    def add(self, part: Tensor) -> Tensor:
        """One all-reduce."""
        part = part.contiguous()
        dist.all_reduce(part, group=self.group)
        return part


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, differentiable; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, a collective call; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def exchange(
    sent: Sequence[Sequence[Tensor]],
    shapes: Sequence[Sequence[tuple[int, int]]],
    group: dist.ProcessGroup | None,
    like: Tensor,
) -> list[list[Tensor]]:
    """An all-to-all: for each rank the matrices ``sent`` to it and the ``shapes`` that come from it."""
    flat = torch.cat([like.new_empty(0), *(piece.reshape(-1) for pieces in sent for piece in pieces)])
    sizes = [[m * n for m, n in expected] for expected in shapes]
    received = flat.new_empty(sum(map(sum, sizes)))
    there = [sum(piece.numel() for piece in pieces) for pieces in sent]
    dist.all_to_all_single(received, flat, [sum(size) for size in sizes], there, group=group)
    pieces = iter(received.split([n for size in sizes for n in size]))
    return [[next(pieces).view(shape) for shape in expected] for expected in shapes]


def chunk(length: int, parts: int, place: int) -> slice:
    """The ``place``-th of ``parts`` blocks as ``torch.chunk`` cuts them; the last ones may be short or empty.

    >>> [chunk(5, 4, place) for place in range(4)]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None), slice(5, 5, None)]
    """
    each = -(-length // parts)
    return slice(min(length, place * each), min(length, (place + 1) * each))


def _length(part: slice) -> int:
    return int(part.stop - part.start)
