"""A plan as plain numbers: one flat row for each engine and number of nodes."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc_oialr.outputs import claim, marked, new_file
from hpc_oialr.plan.forecast import Forecast, Stage
from hpc_oialr.plan.places import label
from hpc_oialr.record.files import to_json

GIB, MB = 1024**3, 1e6
_PLAN = marked("a plan", b'{\n "recipe": ', b"engine,nodes,processes,", mark=b"global_batch")


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


def claim_plan(path: Path, inputs: Sequence[Path | str] = (), *, force: bool = False) -> Path:
    """Where a plan may be written; see :func:`hpc_oialr.outputs.claim`."""
    return claim(path, _PLAN, inputs=inputs, force=force)


def write(
    rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], path: Path, *, force: bool = False
) -> None:
    """JSON with what the plan was made of, or the rows alone as CSV, by the file's ending.

    Raises
    ------
    OutputError
        If the path holds something else than an earlier plan, and ``force`` is not set.
    """
    target = claim_plan(path, force=force)
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_file(target) as draft:
        draft.write_text(_csv(rows) if path.suffix == ".csv" else _json(rows, about), encoding="utf-8")


def _json(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    return to_json({**about, "rows": list(rows)}, indent=1) + "\n"


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for found in rows for name in found))
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, names)
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()
