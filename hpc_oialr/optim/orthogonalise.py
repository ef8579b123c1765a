"""Newton-Schulz of many matrices: those of one shape in a batch, split ones whole on one process each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from hpc_oialr.linalg.work_plan import longest_processing_time
from hpc_oialr.lowrank.layout import chunk, exchange, local

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
    owned = [[i for i, owner in enumerate(owners) if owner == p] for p in range(size)]
    stored = [local(d) for d in directions]
    parts = [part.reshape(-1, n) for part, (_, n) in zip(stored, shapes, strict=True)]
    rows = [[chunk(m, size, p) for p in range(size)] for m, _ in shapes]

    def of_process(i: int, p: int) -> tuple[int, int]:
        return rows[i][p].stop - rows[i][p].start, shapes[i][1]

    there = [[parts[i] for i in theirs] for theirs in owned]
    expected = [[of_process(i, p) for i in owned[rank]] for p in range(size)]
    received = exchange(there, expected, group, parts[0])
    done = _batched([torch.cat(pieces) for pieces in zip(*received, strict=True)], newton_schulz)
    back = [[matrix[rows[i][p]] for i, matrix in zip(owned[rank], done, strict=True)] for p in range(size)]
    expected = [[of_process(i, rank) for i in theirs] for theirs in owned]
    received = exchange(back, expected, group, parts[0])
    results = {
        i: part
        for theirs, pieces in zip(owned, received, strict=True)
        for i, part in zip(theirs, pieces, strict=True)
    }
    return [results[i].view_as(part) for i, part in enumerate(stored)]
