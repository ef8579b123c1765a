"""Where a run stands, read from its folder while it goes on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from hpc_oialr.record.metrics import read_last_metrics
from hpc_oialr.record.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class RunProgress:
    """The last figures of a run; None for those that are not there yet.

    Attributes
    ----------
    step, total_steps
        Steps done, of all.
    step_s
        Time of a step, over the last rows (s).
    age_s
        Time since the last row was written (s).
    loss
        Training loss.
    metric, metric_name
        Last evaluation.
    trained_share
        Trained parameters, of the dense model's, in [0, 1].
    r_mean
        Mean inner dimension of the layers at the last update.
    """

    step: int | None = None
    total_steps: int | None = None
    step_s: float | None = None
    age_s: float = 0.0
    loss: float | None = None
    metric: float | None = None
    metric_name: str = ""
    trained_share: float | None = None
    r_mean: float | None = None

    @property
    def eta_s(self) -> float | None:
        """Time to the end of the run, while it goes on (s)."""
        if self.step is None or self.total_steps is None or self.step_s is None:
            return None
        return max(0.0, (self.total_steps - self.step) * self.step_s - self.age_s)


def read_progress(folder: RunFolder) -> RunProgress:
    """Where the run in a folder stands.

    Raises
    ------
    DataError
        If its metrics are damaged.
    """
    rows = read_last_metrics(folder.metrics)
    steps = [row for row in rows if "loss" in row and "split" not in row]
    evaluations = [row for row in rows if "split" in row]
    updates = [row for row in read_last_metrics(folder.updates) if row.get("r_mean") is not None]
    figures: dict[str, Any] = {}
    if steps:
        last = steps[-1]
        figures = {name: last.get(name) for name in ("step", "total_steps", "loss", "trained_share")}
        figures |= {"step_s": _step_s(steps), "age_s": max(0.0, time.time() - folder.metrics.stat().st_mtime)}
    if evaluations:
        figures |= {name: evaluations[-1].get(name) for name in ("metric", "metric_name")}
    if updates:
        figures["r_mean"] = updates[-1]["r_mean"]
    return RunProgress(**figures)


def _step_s(rows: list[dict[str, Any]]) -> float | None:
    first, last = rows[0], rows[-1]
    steps = last["step"] - first["step"]
    return (last["wall_s"] - first["wall_s"]) / steps if steps > 0 else None
