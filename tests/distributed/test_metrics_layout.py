"""Names to slots and back, and the same bits in whatever order vectors are combined."""

from __future__ import annotations

import functools
import math
import random
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpc_oialr.distributed.metric_reduction import MetricsLayout
from hpc_oialr.errors import WorldError

FIELDS = ("seconds", "r", "stability")
LAYOUT = MetricsLayout(layers=("a", "b"), layer_fields=FIELDS, process_fields=("update_s",), processes=3)
LAYER = {"seconds": 0.5, "r": 7.0, "stability": 0.25}


def bits(values: dict[str, float]) -> list[bytes]:
    return [struct.pack("d", value) for value in values.values()]


def largest(vectors: list[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(torch.maximum, vectors)


def test_slots_stand_in_the_order_of_the_names() -> None:
    assert LAYOUT.size == 2 * 3 + 3 * 1
    vector = LAYOUT.pack(1, {"b": LAYER}, {"update_s": 2.0})
    assert (vector.dtype, vector.shape) == (torch.float64, (9,))
    unknown = -math.inf
    assert vector.tolist() == [unknown, unknown, unknown, 0.5, 7.0, 0.25, unknown, 2.0, unknown]


def test_all_together() -> None:
    parts = [{"b": LAYER}, {}, {"a": LAYER | {"stability": math.nan}}]
    vectors = [LAYOUT.pack(rank, part, {"update_s": float(rank)}) for rank, part in enumerate(parts)]
    gathered = LAYOUT.unpack(largest(vectors))
    assert gathered.layers["b"] == LAYER
    assert gathered.layers["a"]["seconds"] == 0.5
    assert math.isnan(gathered.layers["a"]["stability"])
    assert gathered.processes == [{"update_s": 0.0}, {"update_s": 1.0}, {"update_s": 2.0}]


def test_of_several_processes_on_one_layer_the_slowest_counts() -> None:
    vectors = [
        LAYOUT.pack(rank, {"a": LAYER | {"seconds": rank / 8}, "b": LAYER}, {"update_s": 1.0})
        for rank in range(3)
    ]
    assert LAYOUT.unpack(largest(vectors)).layers["a"]["seconds"] == 0.25


def test_minus_zero_becomes_zero() -> None:
    vector = LAYOUT.pack(0, {"a": LAYER | {"r": -0.0}}, {"update_s": -0.0})
    assert struct.pack("d", vector[1].item()) == struct.pack("d", 0.0)
    assert struct.pack("d", vector[6].item()) == struct.pack("d", 0.0)


def test_nobody_who_knows_is_an_error() -> None:
    vectors = [LAYOUT.pack(rank, {"a": LAYER}, {"update_s": 1.0}) for rank in range(3)]
    with pytest.raises(WorldError, match=r"no process told the metrics of 'b'; at least one must"):
        LAYOUT.unpack(largest(vectors))
    every = [LAYOUT.pack(rank, {"a": LAYER, "b": LAYER}, {"update_s": 1.0}) for rank in range(2)]
    with pytest.raises(WorldError, match=r"no process told the metrics of 'process 2'"):
        LAYOUT.unpack(largest(every))


def test_no_layer_at_all() -> None:
    layout = MetricsLayout(layers=(), layer_fields=FIELDS, process_fields=("t",), processes=1)
    gathered = layout.unpack(layout.pack(0, {}, {"t": 3.0}))
    assert (gathered.layers, gathered.processes) == ({}, [{"t": 3.0}])


numbers = st.floats(allow_infinity=False, width=64)


@given(st.data(), st.integers(1, 5), st.integers(0, 6), st.randoms(use_true_random=False))
def test_any_order_gives_the_same_bits(
    data: st.DataObject, processes: int, count: int, chance: random.Random
) -> None:
    names = tuple(f"layer {i}" for i in range(count))
    layout = MetricsLayout(
        layers=names, layer_fields=("x", "known"), process_fields=("t",), processes=processes
    )
    known = {name: {"x": data.draw(numbers), "known": 1.0} for name in names}
    owners = {name: data.draw(st.integers(0, processes - 1)) for name in names}
    vectors = [
        layout.pack(rank, {name: known[name] for name in names if owners[name] == rank}, {"t": rank + 0.5})
        for rank in range(processes)
    ]
    straight = layout.unpack(largest(vectors))
    chance.shuffle(vectors)
    shuffled = layout.unpack(largest(vectors))
    for name in names:
        expected = {"x": known[name]["x"] + 0.0, "known": 1.0}
        if math.isnan(expected["x"]):
            expected["x"] = math.nan
        assert bits(straight.layers[name]) == bits(expected)
        assert bits(shuffled.layers[name]) == bits(expected)
    assert [row["t"] for row in shuffled.processes] == [rank + 0.5 for rank in range(processes)]
