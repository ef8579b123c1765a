"""What goes through the channel about an update, and what comes out."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch

from hpc_oialr.method.report import LayerUpdate, UpdateReport
from hpc_oialr.record.update_metrics import pack, unpack


def layer(name: str, seconds: float, stability: float | None = 0.5) -> LayerUpdate:
    return LayerUpdate(
        name=name,
        m=4,
        n=5,
        r_before=4,
        r=3,
        singular_values=torch.tensor([4.0, 2.0, 2.0, 0.0]),
        stability=stability,
        orthogonality_error_U=0.0,
        orthogonality_error_Vh=0.0,
        seconds=seconds,
    )


def report(*seconds: float, own: float = 1.0) -> UpdateReport:
    layers = tuple(layer(f"layer {i}", s) for i, s in enumerate(seconds))
    return UpdateReport(t=7, kind="update", layers=layers, seconds=own, bytes_sent=100)


def largest(vectors: list[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(torch.maximum, vectors)


def test_each_rank_tells_what_it_computed() -> None:
    parts = [report(0.25, 0.0, own=1.5), report(0.0, 0.75, own=2.0)]
    vectors = [pack(part, rank, 2) for rank, part in enumerate(parts)]
    assert vectors[0].dtype == torch.float64
    assert vectors[0].tolist() == [0.25, -math.inf, 1.5, -math.inf]
    shared = unpack(parts[0], largest(vectors))
    assert shared.report == replace(parts[0], layers=shared.report.layers)
    assert [update.seconds for update in shared.report.layers] == [0.25, 0.75]
    assert (shared.update_s, shared.svd_s) == ((1.5, 2.0), 1.0)


def test_any_order_gives_the_same_bits_and_the_slowest_counts() -> None:
    parts = [report(0.1 * (rank + 1), rank / 3, own=1 / (rank + 3)) for rank in range(3)]
    vectors = [pack(part, rank, 3) for rank, part in enumerate(parts)]
    for some in itertools.permutations(vectors):
        shared = unpack(parts[0], largest(list(some)))
        assert [update.seconds for update in shared.report.layers] == [0.1 * 3, 2 / 3]
        assert shared.update_s == (1 / 3, 1 / 4, 1 / 5)


def test_nobody_who_knows_is_an_error() -> None:
    parts = [report(0.5, 0.0), report(0.0, 0.0)]
    with pytest.raises(AssertionError, match="timed by some rank"):
        unpack(parts[0], largest([pack(part, rank, 2) for rank, part in enumerate(parts)]))
    with pytest.raises(AssertionError, match="timed by some rank"):
        unpack(parts[0], largest([pack(report(0.5, 0.5), rank, 3) for rank in range(2)]))


def test_no_layer_at_all() -> None:
    assert unpack(report(), pack(report(own=3.0), 0, 1)).update_s == (3.0,)


def test_one_rank_on_the_same_path() -> None:
    one = report(0.25, 0.5)
    shared = unpack(one, pack(one, 0, 1))
    assert [update.seconds for update in shared.report.layers] == [0.25, 0.5]
    assert shared.row() == {
        "step": 7,
        "kind": "update",
        "layers": 2,
        "update_s": [1.0],
        "svd_s": 0.75,
        "bytes_sent": 100,
        "r_mean": 3.0,
        "stability_mean": 0.5,
        "stable_rank_mean": 1.5,
        "effective_rank_mean": pytest.approx(math.exp(1.5 * math.log(2))),
    }


def test_a_mean_leaves_out_layers_without_a_number() -> None:
    layers = (layer("a", 0.1, None), layer("b", 0.1, 0.75))
    one = UpdateReport(t=1, kind="stability", layers=layers, seconds=1.0, bytes_sent=0)
    assert unpack(one, pack(one, 0, 1)).row()["stability_mean"] == 0.75
    none = replace(one, layers=one.layers[:1])
    assert math.isnan(unpack(none, pack(none, 0, 1)).row()["stability_mean"])
