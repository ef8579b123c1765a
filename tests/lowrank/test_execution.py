"""The cost formulas, and the crossover a measurement gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpc_oialr.errors import ConfigError
from hpc_oialr.lowrank.execution import (
    dense_cost,
    factored_cost,
    measured_crossover,
    merged_cost,
    prefer_factored,
)


def test_square_layer_is_cheaper_below_0_535_k() -> None:
    k, tokens = 1000, 10**6
    assert factored_cost(tokens, k, k, 534) < dense_cost(tokens, k, k) < factored_cost(tokens, k, k, 536)


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
