"""A plan as plain numbers: one flat row for each engine and number of nodes."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc_oialr.outputs import claim, marked, new_file
from hpc_oialr.plan.deployment import label
from hpc_oialr.plan.planner import Forecast
from hpc_oialr.record.files import to_json

GIB, MB = 1024**3, 1e6
_PLAN = marked("a plan", b'{\n "recipe": ', b"engine,nodes,processes,", mark=b"global_batch")


def row(forecast: Forecast, memory_gib: float, *, basis: str, advice: str = "") -> dict[str, Any]:
    """One forecast; units end the names. What does not exist is left out.

    Parameters
    ----------
    basis
        See :attr:`hpc_oialr.plan.planner.Planner.basis`.
    """
    d = forecast.deployment
    found: dict[str, Any] = {
        "engine": label(forecast.engine),
        "nodes": d.nodes,
        "processes": d.processes,
        "batch": d.batch,
        "global_batch": forecast.global_batch,
    }
    if forecast.incompatibility is not None:
        return found | {"fits": False, "advice": forecast.incompatibility}
    found["steps"] = forecast.steps
    for name, stage in forecast.stages.items():
        memory = stage.memory
        found |= {
            f"{name}_parameters_gib": memory.parameters / GIB,
            f"{name}_gradients_gib": memory.gradients / GIB,
            f"{name}_optimizer_gib": memory.state / GIB,
            f"{name}_activations_gib": memory.activations / GIB,
            f"{name}_peak_gib": memory.peak / GIB,
            f"{name}_gflop": stage.flops / 1e9,
            f"{name}_sent_mb": stage.sent / MB,
            f"{name}_compute_s": stage.compute_s,
            f"{name}_waiting_s": stage.waiting_s,
            f"{name}_step_s": stage.seconds,
        }
    for name, event in forecast.events.items():
        found |= {
            f"{name}_peak_gib": event.peak / GIB,
            f"{name}_s": event.seconds,
            f"{name}_svd_s": event.svd_s,
            f"{name}_sent_mb": event.sent / MB,
        }
    return found | {
        "peak_gib": forecast.peak / GIB,
        "fits": forecast.fits(memory_gib),
        "time_from": basis,
        "dense_s": forecast.dense_s,
        "oialr_s": forecast.oialr_s,
        "events_s": forecast.events_s,
        "advice": advice,
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
        text = (
            _csv(rows) if path.suffix == ".csv" else to_json({**about, "rows": list(rows)}, indent=1) + "\n"
        )
        draft.write_text(text, encoding="utf-8")


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for found in rows for name in found))
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, names)
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()
