"""What the page and the paper plots draw: plain numbers and arrays, no plotting library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from hpc_oialr.errors import DataError
from hpc_oialr.report.runs import Numbers, Run, dense_of
from hpc_oialr.spectra import Layer, Spectra

COSTS = {
    "training time": "wall_s",
    "time of a step": "step_s",
    "peak memory": "peak_memory_gib",
    "trained parameters": "trainable_params",
}


def ratios_to_dense(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """For every run but the dense one, each of :data:`COSTS` over the dense run's.

    Raises :class:`DataError` without a dense run or another one, or if one has not ended.
    """
    dense = dense_of(runs)
    others = [run for run in runs if run is not dense]
    if dense is None or not others:
        names = ", ".join(run.name for run in runs)
        raise DataError(
            f"runs are {names}; one must be dense and one not. Name the folder of oialr compare, or a run "
            "of the same recipe with --oialr null."
        )

    def costs(run: Run) -> dict[str, float]:
        if not run.summary:
            raise DataError(f"{run.folder.path} has no summary.json: the run has not ended. Let it end.")
        numbers = {**run.summary, "step_s": run.summary["wall_s"] / max(1, run.summary["steps"])}
        return {label: float(numbers[key]) for label, key in COSTS.items()}

    base = costs(dense)
    return {run.name: {label: value / base[label] for label, value in costs(run).items()} for run in others}


def step_seconds(run: Run) -> tuple[Numbers, Numbers]:
    """Steps in the middle between two rows of losses, and seconds a step took there."""
    curve = run.losses
    steps, seconds = np.diff(curve.step), np.diff(curve.wall_s)
    fine = (steps > 0) & (seconds >= 0)
    middle = (curve.step[1:] + curve.step[:-1])[fine] / 2
    return middle, seconds[fine] / steps[fine]


def conversions(layers: Iterable[Layer]) -> list[int]:
    """Steps at which layers were converted, ascending, each once."""
    found = (layer.t[np.array(layer.kinds) == "conversion"] for layer in layers if len(layer))
    return sorted({int(step) for steps in found for step in steps})


def share_of_k(run: Spectra, last_step: int | None = None) -> tuple[NDArray[np.int64], Numbers]:
    """r / k between events: edges (0, the steps of all events, the end), and shares [layers, edges - 1].

    A share is 1 before a layer's conversion. The end is ``last_step``, or a little after the last event.
    """
    steps = np.unique(run.events["t"])
    end = int(steps[-1]) if len(steps) else 0
    after = last_step if last_step and last_step > end else end + max(1, round(0.03 * end))
    edges = np.unique(np.concatenate([[0], steps, [after]])).astype(np.int64)
    shares = np.ones((len(run), len(edges) - 1))
    for row, layer in enumerate(run.values()):
        # A column shows the last event at or before its left edge.
        last = np.searchsorted(layer.t, edges[:-1], side="right") - 1
        shares[row, last >= 0] = layer.r[last[last >= 0]] / layer.k
    return edges, shares


def spread(count: int, most: int) -> NDArray[np.int64]:
    """At most ``most`` of ``count`` indices, equally far apart, with the first and the last.

    Examples
    --------
    >>> spread(100, 4).tolist(), spread(3, 40).tolist(), spread(0, 4).tolist()
    ([0, 33, 66, 99], [0, 1, 2], [])
    """
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def settling_steps(run: Spectra, threshold: float) -> dict[str, float]:
    """From which step on each layer's stability stays at or above a threshold; infinite if it does not.

    Layers without a measurement are left out.
    """
    found = {}
    for name, layer in run.items():
        known = np.isfinite(layer.stability)
        steps, below = layer.t[known], layer.stability[known] < threshold
        if len(steps):
            last = int(np.flatnonzero(below)[-1]) + 1 if below.any() else 0
            found[name] = float(steps[last]) if last < len(steps) else float("inf")
    return found
