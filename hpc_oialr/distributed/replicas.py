"""Check that replicas are equal bit for bit: a cheap hash of every layer, compared over all ranks."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hpc_oialr.errors import ReplicaMismatchError
from hpc_oialr.linalg.splitmix import INCREMENT, mix

if TYPE_CHECKING:
    from hpc_oialr.method.engine import Peers

# Values hashed at a time: bounds the int64 copies to 2 MiB while a GPU still has enough to do.
_CHUNK = 1 << 17
_STEP = 0x5851F42D4C957F2D  # Knuth's MMIX multiplier: odd, so that nothing is lost modulo 2^64
_INTEGERS = {1: torch.uint8, 2: torch.int16}


def check_equal(named: Mapping[str, Sequence[Tensor]], world: Peers) -> None:
    """Raise :class:`ReplicaMismatchError`, which names layers and ranks, on every rank unless all bits are equal.

    ``named``: the tensors of each layer, of any shapes, dtypes and devices; the same names in the same order on all
    ranks. Sends 16 bytes a name, by one all-reduce.
    """
    if world.size == 1 or not named:
        return
    hashes = torch.zeros(len(named), dtype=torch.int64, device=world.device)
    for row, tensors in enumerate(named.values()):
        for tensor in tensors:
            hashes[row] = hashes[row] * _STEP + bit_hash(tensor).to(world.device)
    # max(~h) = ~min(h): one reduction gives maximum and minimum.
    highest, lowest = world.all_reduce(torch.cat([hashes, ~hashes]), op="max").chunk(2)
    if not torch.equal(highest, ~lowest):
        _explain(list(named), world.all_gather_object(hashes.tolist()))


@torch.no_grad()
def bit_hash(tensor: Tensor) -> Tensor:
    """64-bit hash of a tensor's bits, order, shape and dtype; int64 of shape (), on its device.

    A sum of (bits as integers of at most 32 bits) x (odd 64-bit weights), modulo 2^64: any one changed value is seen, and
    sign flips of whole columns, which are common in SVDs, cannot cancel.
    """
    # 64-bit values as two halves: times 2^63 a weight leaves one bit, and pairs of sign flips would cancel.
    integers = _INTEGERS.get(tensor.element_size(), torch.int32)
    bits = tensor.detach().contiguous().reshape(-1).view(integers)
    counter = torch.arange(1, min(_CHUNK, bits.numel()) + 1, device=bits.device)
    weights = mix(counter * INCREMENT) | 1
    label = zlib.crc32(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    total = torch.full((), label, dtype=torch.int64, device=bits.device)
    for chunk in bits.split(_CHUNK) if bits.numel() else ():
        total = total * _STEP + (chunk.long() * weights[: chunk.numel()]).sum()
    return total


def _explain(names: list[str], hashes: list[list[int]]) -> None:
    """Name what differs; ties go to rank 0."""
    lines = []
    for i, name in enumerate(names):
        held = [row[i] for row in hashes]
        usual = max(Counter(held).items(), key=lambda item: (item[1], item[0] == held[0]))[0]
        odd = [str(rank) for rank, value in enumerate(held) if value != usual]
        if odd:
            lines.append(f"{name} (rank {', '.join(odd)})")
    more = " and more" if len(lines) > 10 else ""
    raise ReplicaMismatchError(
        f"ranks hold different bits: {'; '.join(lines[:10])}{more}; replicas must be equal after every "
        "update. Something changed a parameter on one rank only: look for a seed, a hook, a faulty node."
    )
