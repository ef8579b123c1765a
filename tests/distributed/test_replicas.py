"""The hash sees every change of a bit, and the message names layer and process."""

from __future__ import annotations

import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.spawn import spawn

from hpc_oialr.distributed import World, check_equal, replicas
from hpc_oialr.distributed.replicas import bit_hash
from hpc_oialr.errors import ReplicaMismatchError
from hpc_oialr.linalg.splitmix import INCREMENT, mix

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def slow_hash(tensor: torch.Tensor) -> int:
    """The same sum in Python integers."""
    integers = {1: torch.uint8, 2: torch.int16}.get(tensor.element_size(), torch.int32)
    bits = tensor.contiguous().reshape(-1).view(integers).tolist()
    counter = torch.arange(1, min(replicas._CHUNK, max(1, len(bits))) + 1)
    weights = (mix(counter * INCREMENT) | 1).tolist()
    total = zlib.crc32(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    for start in range(0, len(bits), replicas._CHUNK):
        chunk = bits[start : start + replicas._CHUNK]
        total = total * replicas._STEP + sum(b * w for b, w in zip(chunk, weights, strict=False))
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (5, 3), (400, 400)])
def test_equal_to_a_slow_one(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 10).abs().to(dtype)
    assert bit_hash(tensor).item() == slow_hash(tensor)


@settings(deadline=None)
@given(st.integers(0, 4999), st.integers(0, 63))
def test_every_flipped_bit_is_seen(place: int, bit: int) -> None:
    before = torch.arange(5000)
    after = before.clone()
    after[place] ^= -(2**63) if bit == 63 else 1 << bit
    assert bit_hash(before) != bit_hash(after)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 299_999), st.integers(0, 299_999))
def test_every_swap_is_seen(first: int, second: int) -> None:
    before = torch.arange(300_000, dtype=torch.int32)
    after = before.clone()
    after[[first, second]] = after[[second, first]]
    assert (bit_hash(before) == bit_hash(after)) == (first == second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_signs_of_whole_columns_are_seen(dtype: torch.dtype) -> None:
    before = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    hashes = set()
    for columns in range(256):
        signs = torch.tensor([-1.0 if columns >> i & 1 else 1.0 for i in range(8)], dtype=dtype)
        hashes.add(bit_hash(before * signs).item())
    assert len(hashes) == 256


def test_bits_not_values_are_compared() -> None:
    zero, nan = torch.zeros(2), torch.full((2,), float("nan"))
    assert bit_hash(zero) != bit_hash(-zero)
    assert bit_hash(nan) == bit_hash(nan.clone())
    assert bit_hash(zero) != bit_hash(zero.double())
    assert bit_hash(zero) != bit_hash(zero.view(1, 2))


def test_a_view_hashes_like_its_copy() -> None:
    matrix = torch.randn(6, 4)
    assert bit_hash(matrix.mT) == bit_hash(matrix.mT.contiguous())


def test_one_process_has_nothing_to_compare() -> None:
    check_equal({"a": [torch.ones(2)]}, World.single("cpu"))


def compare(rank: int, size: int) -> str:
    world = World.from_environment(timeout_s=60)
    layers = {name: [torch.arange(6.0).view(2, 3), torch.ones(4)] for name in ("first", "second", "third")}
    check_equal(layers, world)
    check_equal({}, world)
    if rank == 1:
        layers["second"][0][0, 1] = 7.0
        layers["third"].reverse()
    with pytest.raises(ReplicaMismatchError) as caught:
        check_equal(layers, world)
    return str(caught.value)


def test_a_mismatch_names_layer_and_process() -> None:
    messages = spawn(compare, 3)
    assert len(set(messages)) == 1
    assert "different bits: second (rank 1); third (rank 1); replicas must be equal" in messages[0]
    assert "first" not in messages[0]
