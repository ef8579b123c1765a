"""Runs of a few seconds: a byte-level model on text made here, small enough for any test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

RECIPE: dict[str, Any] = {
    "data": {
        "class_path": "TextFolder",
        "init_args": {"sequence_length": 16, "validation_fraction": 0.2, "test_fraction": 0.2},
    },
    "model": {"class_path": "GPT2", "init_args": {"dim": 16, "depth": 1, "heads": 2, "dropout": 0.1}},
    "task": {"class_path": "LanguageModelling"},
    "optimizer": {"class_path": "MuonAdamW", "init_args": {"lr": 0.02}},
    "schedule": {"class_path": "WarmupCosine", "init_args": {"warmup": 0.1}},
    "oialr": {
        "delay": 6,
        "frequency": 4,
        "rule": {"class_path": "FixedFraction", "init_args": {"fraction": 0.25}},
        "limits": {"at_conversion": 0.75, "max_drop": 0.3, "round_to": 1},
        "layer_share_step": 1.0,
    },
    "train": {"steps": 24, "global_batch": 8, "evaluations": 4, "evaluation_batch": 16, "device": "cpu"},
    "checkpoint": {"every": 5, "keep": 2},
    "record": {"every": 1},
}


def write_text_folder(folder: Path, documents: int = 20) -> Path:
    """Documents of words that follow a simple chain, so that there is something to learn."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    words = ["low", "rank", "training", "pays", "basis", "core", "stable"]
    for i in range(documents):
        start = int(generator.integers(len(words)))
        text = " ".join(words[(start + j) % len(words)] for j in range(40))
        (folder / f"{i:02d}.txt").write_text(text)
    return folder


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` on top of ``base``, section by section."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        both = both and value.get("class_path", base[key].get("class_path")) == base[key].get("class_path")
        result[key] = merged(base[key], value) if both else value
    return result


def write_recipe(folder: Path, **over: Any) -> Path:
    """The tiny recipe with its text, as a file."""
    text = write_text_folder(folder / "text")
    tree = merged(RECIPE, {"data": {"init_args": {"path": str(text)}}})
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(merged(tree, over)))
    return path
