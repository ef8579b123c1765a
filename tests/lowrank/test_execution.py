"""The cost formulas, and the crossover a measurement gives."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from hpc_oialr import OIALR, OIALRConfig, RankLimits
from hpc_oialr.errors import ConfigError
from hpc_oialr.lowrank import low_rank_layers
from hpc_oialr.lowrank.execution import (
    crossover_by_dtype,
    dense_cost,
    factored_cost,
    folds,
    measured_crossover,
    merged_cost,
    prefer_factored,
)


def test_a_square_layer_is_cheaper_below_0_645_k() -> None:
    k, tokens = 1000, 10**7
    assert factored_cost(tokens, k, k, 645) < dense_cost(tokens, k, k) < factored_cost(tokens, k, k, 647)


def test_folding_the_core_is_counted_where_it_saves() -> None:
    m, n, r = 300, 100, 50
    assert not folds(200, m, n)
    assert folds(201, m, n)
    three_products = 2 * 200 * r * (m + n) + 3 * 200 * r**2
    assert factored_cost(200, m, n, r) == three_products
    assert factored_cost(1000, m, n, r) == 2 * 1000 * r * (m + n) + r**2 * (1000 + m + n)


def test_few_tokens_prefer_factored_up_to_a_larger_r() -> None:
    assert prefer_factored(8, 256, 256, 256)
    assert not prefer_factored(10**5, 256, 256, 256)
    assert not prefer_factored(8, 256, 256, 64, crossover=0.0)


def test_crossover_from_a_result_file(tmp_path: Path) -> None:
    """Factored exactly twice as slow per operation as merged: it pays up to half the operations."""
    rows = []
    for r in (96, 192, 384, 768):
        flops = factored_cost(1576, 768, 768, r) / merged_cost(1576, 768, 768, r)
        rows.append({"m": 768, "n": 768, "r": r, "tokens": 1576, "dtype": "float32",
                     "time_ratio": 2.718281828 ** (flops - 0.5), "rebuild_ratio": 1.0})  # fmt: skip
    path = tmp_path / "layer.json"
    path.write_text(json.dumps({"rows": rows}))
    assert measured_crossover(path) == pytest.approx(0.5, abs=1e-6)
    with pytest.raises(ConfigError, match="must hold rows of dtype bfloat16"):
        measured_crossover(path, "bfloat16")


def _measured(path: Path, **crossovers: float) -> None:
    rows = []
    for dtype, crossover in crossovers.items():
        for r in (96, 384, 768):
            flops = factored_cost(1576, 768, 768, r) / merged_cost(1576, 768, 768, r)
            rows.append({"m": 768, "n": 768, "r": r, "tokens": 1576, "dtype": dtype,
                         "time_ratio": math.exp(flops - crossover), "rebuild_ratio": 1.0})  # fmt: skip
    path.write_text(json.dumps({"rows": rows}))


def test_a_layer_takes_the_crossover_of_the_dtype_it_runs_in(tmp_path: Path) -> None:
    path = tmp_path / "layer.json"
    _measured(path, float32=0.9, bfloat16=0.1)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    limits = RankLimits(at_conversion=0.5)
    config = OIALRConfig(delay=1, limits=limits, crossover=str(path))
    OIALR(model, torch.optim.SGD(model.parameters(), 0.1), config).step()
    layer = next(iter(low_rank_layers(model).values()))
    tokens = 10**5
    ratio = factored_cost(tokens, 64, 64, 32) / merged_cost(tokens, 64, 64, 32)
    assert 0.1 < ratio < 0.95
    layer = copy.deepcopy(layer)
    held = cast(Any, layer.crossover)
    assert held[torch.float32] == pytest.approx(0.9, abs=1e-6)
    layer.crossover = {**held, torch.float32: 0.95}
    assert layer.factored(tokens)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert not layer.factored(tokens)
        assert not copy.deepcopy(layer).to(dtype).factored(tokens)
    assert layer.double().factored(tokens) == (ratio <= 0.9)


def test_without_rows_of_bf16_those_of_fp32_are_taken_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "layer.json"
    _measured(path, float32=0.4)
    assert crossover_by_dtype(path)[torch.bfloat16] == pytest.approx(0.4)
    assert f"{path} holds no rows of bfloat16: layers that run in bf16 or fp16 are" in caplog.text
    _measured(path, bfloat16=0.4)
    with pytest.raises(ConfigError, match="must hold rows of dtype float32"):
        crossover_by_dtype(path)
