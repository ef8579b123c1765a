"""Run folders with few, known numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from hpc_oialr.spectra.files import write_record
from hpc_oialr.spectra.schema import EVENT, KINDS, LayerRows

EVIL = "<script>window.hacked = 1</script>"
NAMES = ("encoder.0.fc1", "encoder.0.fc2", EVIL)
K = 8
STEPS = (10, 20, 30, 40, 50)
EVENT_KINDS = ("stability", "stability", "conversion", "update", "update")
R = (8, 8, 6, 4, 4)


def make_run(folder: Path, *, dense: bool = False, names: Sequence[str] = NAMES, ended: bool = True) -> Path:
    """A run of 50 steps; the low-rank one has five events of each layer, the dense one none."""
    folder.mkdir(parents=True)
    config = {"train": {"steps": 50, "seed": 0}, "oialr": None if dense else {"delay": 30}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "machine": {"node": "n<1>"}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows(dense=dense)))
    if ended:
        (folder / "summary.json").write_text(json.dumps(_summary(dense=dense)))
    if not dense:
        make_record(folder / "spectra.h5", names)
    return folder


def make_record(path: Path, names: Sequence[str] = NAMES) -> None:
    """Stability of layer i: 0.5, 0.96, NaN at the conversion, 0.97 + i / 1000, 0.99."""
    values = np.tile(np.linspace(2.0, 0.25, K, dtype=np.float32), (len(STEPS), 1))
    values[np.arange(K) >= np.array([8, 8, 8, 6, 4])[:, None]] = np.nan
    layers = [LayerRows(name, index, 2 * K, K, _events(index), values) for index, name in enumerate(names)]
    write_record(path, {"config": {}, "environment": {}, "seed": 0}, layers)


def _events(index: int) -> np.ndarray:
    events = np.zeros(len(STEPS), dtype=EVENT)
    for field in EVENT.names or ():
        if EVENT[field].kind == "f":
            events[field] = np.nan
    events["t"], events["r"] = STEPS, R
    events["kind"] = [KINDS[kind] for kind in EVENT_KINDS]
    events["r_before"] = (8, 8, 8, 6, 4)
    events["cut_values"] = events["r_before"] - events["r"]
    events["stability"] = (0.5, 0.96, np.nan, 0.97 + index / 1000, 0.99)
    events["stable_rank"] = 3.0
    events["noise_edge"], events["values_above_edge"] = 1.5, 3
    return events


def _rows(*, dense: bool) -> list[dict[str, object]]:
    slow, rows = (2.0 if dense else 1.0), []
    for step in STEPS:
        share = 1.0 if dense or step <= 30 else 0.25
        rows.append({"step": step, "loss": 1 / step, "lr": 0.1, "wall_s": slow * step, "trained_share": share})
        if step in (20, 50):
            metric = {"split": "test", "metric_name": "test_accuracy", "metric": 0.5 + step / 1000}
            rows.append({"step": step, "wall_s": slow * step, **metric})
    return rows


def _summary(*, dense: bool) -> dict[str, object]:
    return {
        "metric": 0.55,
        "metric_name": "test_accuracy",
        "wall_s": 100.0 if dense else 50.0,
        "update_wall_s": 0.5,
        "steps": 50,
        "trainable_params": 1000 if dense else 250,
        "dense_trainable_params": 1000,
        "peak_memory_gib": 0.5 if dense else 0.4,
        "world_size": 1,
        "seed": 0,
    }
