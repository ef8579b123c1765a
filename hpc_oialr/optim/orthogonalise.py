"""Newton-Schulz of many matrices: those of one shape in a batch, split ones whole on one process each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from hpc_oialr.linalg.work_plan import longest_processing_time

Map = Callable[[Tensor], Tensor]


def orthogonalise(directions: Sequence[Tensor], newton_schulz: Map) -> list[Tensor]:
    """``newton_schulz`` of every matrix, in the same order and stored the same way.

    Parameters
    ----------
    directions
        Tensors of any number of axes, flattened to (leading axis) x (all the rest); those that are
        DTensors are split along their first axis.
    newton_schulz
        Of a batch of matrices, b x m x n.

    Returns
    -------
    list of Tensor
        For a whole matrix the result; for a split one this process's part of it, as stored.

    Notes
    -----
    Split matrices are dealt over the processes by cost, each is orthogonalised whole by one: an
    all-to-all of m n / P numbers a matrix brings the parts there, another one back.
    """
    results: list[Tensor | None] = [None] * len(directions)
    whole = [i for i, d in enumerate(directions) if not isinstance(d, DTensor)]
    for i, result in zip(whole, _batched([directions[i] for i in whole], newton_schulz), strict=True):
        results[i] = result
    for group, members in _by_group(directions).items():
        split = [directions[i] for i in members]
        for i, part in zip(members, _exchanged(split, group, newton_schulz), strict=True):
            results[i] = part
    return [result for result in results if result is not None]


def _by_group(directions: Sequence[Tensor]) -> dict[dist.ProcessGroup, list[int]]:
    groups: defaultdict[dist.ProcessGroup, list[int]] = defaultdict(list)
    for i, direction in enumerate(directions):
        if isinstance(direction, DTensor):
            axis = next(a for a, p in enumerate(direction.placements) if isinstance(p, Shard))
            groups[direction.device_mesh.get_group(axis)].append(i)
    return groups


def _batched(matrices: Sequence[Tensor], newton_schulz: Map) -> list[Tensor]:
    """Matrices of one shape, dtype and device go through in one batch."""
    flat = [matrix.reshape(matrix.shape[0], -1) for matrix in matrices]
    batches: defaultdict[tuple[torch.Size, torch.device, torch.dtype], list[int]] = defaultdict(list)
    for i, matrix in enumerate(flat):
        batches[matrix.shape, matrix.device, matrix.dtype].append(i)
    results = list(flat)
    for members in batches.values():
        done = newton_schulz(torch.stack([flat[i] for i in members]))
        for i, result in zip(members, done.unbind(), strict=True):
            results[i] = result
    return [result.view_as(matrix) for result, matrix in zip(results, matrices, strict=True)]


def _exchanged(directions: Sequence[Tensor], group: dist.ProcessGroup, newton_schulz: Map) -> list[Tensor]:
    """To the owners, through Newton-Schulz there, and back; all of one group, in one dtype."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    shapes = [(d.shape[0], d.numel() // d.shape[0]) for d in directions]
    owners = longest_processing_time([float(m) * n * min(m, n) for m, n in shapes], size)
    rows = [[_rows(m, size, p) for p in range(size)] for m, _ in shapes]
    parts = [d.to_local().reshape(-1, n) for d, (_, n) in zip(directions, shapes, strict=True)]  # type: ignore[attr-defined]
    mine = [i for i, owner in enumerate(owners) if owner == rank]
    # What process p sends to owner o: its rows of o's matrices, in order; the way back is the mirror image.
    there = [sum(rows[i][rank] * shapes[i][1] for i in _of(owners, o)) for o in range(size)]
    back = [sum(rows[i][p] * shapes[i][1] for i in mine) for p in range(size)]
    sent = torch.cat([parts[i].reshape(-1) for o in range(size) for i in _of(owners, o)])
    received = _all_to_all(sent, there, back, group)
    pieces = _cut(received, [(rows[i][p], shapes[i][1]) for p in range(size) for i in mine])
    whole = [torch.cat(pieces[j :: len(mine)]) for j in range(len(mine))]
    done = _batched(whole, newton_schulz)
    returned = [done[j][_start(i, p, rows) :][: rows[i][p]] for p in range(size) for j, i in enumerate(mine)]
    sent = torch.cat([piece.reshape(-1) for piece in returned]) if returned else sent.new_empty(0)
    received = _all_to_all(sent, back, there, group)
    order = [i for o in range(size) for i in _of(owners, o)]
    results = dict(zip(order, _cut(received, [(rows[i][rank], shapes[i][1]) for i in order]), strict=True))
    return [results[i].view_as(d.to_local()) for i, d in enumerate(directions)]  # type: ignore[attr-defined]


def _of(owners: Sequence[int], owner: int) -> list[int]:
    return [i for i, o in enumerate(owners) if o == owner]


def _rows(m: int, size: int, place: int) -> int:
    """Rows of process ``place``, as ``torch.chunk`` deals them."""
    chunk = -(-m // size)
    return min(m, (place + 1) * chunk) - min(m, place * chunk)


def _start(i: int, place: int, rows: Sequence[Sequence[int]]) -> int:
    return sum(rows[i][:place])


def _cut(flat: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    pieces = flat.split([m * n for m, n in shapes]) if shapes else ()
    return [piece.view(m, n) for piece, (m, n) in zip(pieces, shapes, strict=True)]


def _all_to_all(sent: Tensor, there: Sequence[int], back: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    received = sent.new_empty(sum(back))
    dist.all_to_all_single(received, sent, list(back), list(there), group=group)
    return received
