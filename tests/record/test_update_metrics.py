"""What goes through the channel about an event, and what comes out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hpc_oialr.method.report import LayerUpdate, UpdateReport
from hpc_oialr.record.update_metrics import effective_rank, layer_values, pack, stable_rank, unpack


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


def test_each_process_tells_what_it_computed() -> None:
    parts = [report(0.25, 0.0, own=1.5), report(0.0, 0.75, own=2.0)]
    largest = torch.maximum(pack(parts[0], 0, 2), pack(parts[1], 1, 2))
    shared = unpack(parts[0], 2, largest)
    assert shared.report == replace(parts[0], layers=shared.report.layers)
    assert [update.seconds for update in shared.report.layers] == [0.25, 0.75]
    assert (shared.update_s, shared.svd_s) == ((1.5, 2.0), 1.0)
    assert largest.numel() == 2 * 7 + 2


def test_one_process_on_the_same_path() -> None:
    one = report(0.25, 0.5)
    shared = unpack(one, 1, pack(one, 0, 1))
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
    one = UpdateReport(
        t=1,
        kind="stability",
        layers=(layer("a", 0.1, None), layer("b", 0.1, 0.75)),
        seconds=1.0,
        bytes_sent=0,
    )
    assert unpack(one, 1, pack(one, 0, 1)).row()["stability_mean"] == 0.75
    none = replace(one, layers=one.layers[:1])
    assert math.isnan(unpack(none, 1, pack(none, 0, 1)).row()["stability_mean"])


def test_ranks_of_a_spectrum() -> None:
    equal = layer_values(replace(layer("a", 0.1), singular_values=torch.full((6,), 3.0)))
    assert stable_rank(equal) == pytest.approx(6)
    assert effective_rank(equal) == pytest.approx(6)
    zero = layer_values(replace(layer("a", 0.1), singular_values=torch.zeros(6)))
    assert (stable_rank(zero), effective_rank(zero)) == (0.0, 0.0)
