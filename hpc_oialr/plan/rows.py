"""A plan as plain numbers: one flat row for each engine and number of nodes."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc_oialr.plan.forecast import Forecast, Stage
from hpc_oialr.plan.places import label
from hpc_oialr.record.files import to_json, write_atomically

GIB, MB = 1024**3, 1e6


def row(forecast: Forecast, memory_gib: float, advice: str = "") -> dict[str, Any]:
    """One forecast; units end the names. What does not exist is left out."""
    place = forecast.place
    found: dict[str, Any] = {
        "engine": label(forecast.engine),
        "nodes": place.nodes,
        "processes": place.processes,
        "batch": place.batch,
        "global_batch": forecast.global_batch,
    }
    if forecast.misfit is not None:
        return found | {"fits": False, "advice": forecast.misfit}
    found["steps"] = forecast.steps
    for name, stage in forecast.stages.items():
        found |= {f"{name}_{key}": value for key, value in _of_stage(stage).items()}
    for name, event in forecast.events.items():
        found |= {
            f"{name}_peak_gib": event.peak / GIB,
            f"{name}_s": event.time.total_s,
            f"{name}_svd_s": event.time.svd_s,
            f"{name}_sent_mb": event.time.sent_bytes / MB,
        }
    return found | {
        "peak_gib": forecast.peak / GIB,
        "fits": forecast.peak <= memory_gib * GIB,
        "dense_s": forecast.dense_s,
        "oialr_s": forecast.oialr_s,
        "events_s": forecast.events_s,
        "advice": advice,
    }


def _of_stage(stage: Stage) -> Mapping[str, float]:
    memory, time = stage.memory, stage.time
    return {
        "parameters_gib": memory.parameters / GIB,
        "gradients_gib": memory.gradients / GIB,
        "optimizer_gib": memory.state / GIB,
        "activations_gib": memory.activations / GIB,
        "peak_gib": memory.peak / GIB,
        "gflop": stage.flops / 1e9,
        "sent_mb": time.sent_bytes / MB,
        "compute_s": time.compute_s,
        "waiting_s": time.waiting_s,
        "step_s": time.total_s,
    }


def write(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], path: Path) -> None:
    """JSON with what the plan was made of, or the rows alone as CSV, by the file's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".csv":
        write_atomically(path, to_json({**about, "rows": list(rows)}, indent=1) + "\n")
        return
    names = list(dict.fromkeys(name for found in rows for name in found))
    text = io.StringIO()
    table = csv.DictWriter(text, names)
    table.writeheader()
    table.writerows(rows)
    write_atomically(path, text.getvalue())
