"""What the page's charts draw of a run, thinned so that a page of a long run stays quick."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_oialr.report.figure_data import conversions, spread, step_seconds
from hpc_oialr.report.page.packing import floats, logarithms
from hpc_oialr.report.runs import Curve, Run
from hpc_oialr.spectra import Layer, Spectra
from hpc_oialr.spectra.schema import kind_words

# More columns than a chart has pixels, more steps than a slider has places, more points than a curve shows.
COLUMNS, SPECTRA, INDICES, POINTS = 512, 100, 64, 512

QUANTITIES = {
    "stability": "stability",
    "r": "r / k",
    "stable_rank": "stable rank",
    "effective_rank": "effective rank",
    "values_above_edge": "values above the noise edge",
    "alpha": "power-law exponent alpha",
    "condition_number": "condition number",
    "subspace_angle_U": "largest angle of U to the basis before (rad)",
    "subspace_angle_Vh": "largest angle of Vh to the basis before (rad)",
    "r_factor_distance": "distance to the R factor before",
    "orthogonality_error_U": "orthogonality error of U",
    "orthogonality_error_Vh": "orthogonality error of Vh",
}


def page_data(run: Run) -> dict[str, Any]:
    """Everything of a run that the page's script reads; plain values fit for JSON."""
    record = run.spectra
    layers = None if record is None or not len(record.events) else of_layers(record, run.last_step)
    return {
        "name": run.name,
        "dense": run.dense,
        "evaluations": _curve(run.evaluations),
        "losses": _curve(run.losses),
        "step_ms": _step_times(run),
        "layers": layers,
        "spectra": []
        if layers is None or record is None
        else [of_spectrum(layer) for layer in record.values()],
    }


def of_layers(record: Spectra, last_step: int) -> dict[str, Any]:
    """Every quantity that was recorded, as a matrix of layers by steps."""
    steps, columns = _columns(record)
    quantities = {}
    for field, label in QUANTITIES.items():
        matrix = _matrix(record, field, columns, len(steps))
        if np.isfinite(matrix).any():
            quantities[field] = {"label": label, "values": floats(matrix)}
    return {
        "names": list(record.layers),
        "k": [layer.k for layer in record.values()],
        "shapes": [f"{layer.m} x {layer.n}" for layer in record.values()],
        "steps": steps.tolist(),
        "recorded_steps": len(np.unique(record.events["t"])),
        "last_step": max(last_step, int(steps[-1])),
        "conversions": conversions(record.values()),
        "quantities": quantities,
    }


def of_spectrum(layer: Layer) -> dict[str, Any]:
    """At most 100 of a layer's spectra, each at 64 indices as far apart as a logarithmic axis shows them."""
    rows, indices = spread(len(layer), SPECTRA), log_indices(layer.k, INDICES)
    values = layer.singular_values[rows][:, indices]
    events = layer.events[rows]
    return {
        "index": (indices + 1).tolist(),
        "values": logarithms(values),
        "step": events["t"].tolist(),
        "kind": kind_words(events["kind"]),
        "r_before": events["r_before"].tolist(),
        "r": events["r"].tolist(),
        "noise_edge": _or_none(events["noise_edge"]),
        "above": _or_none(events["values_above_edge"]),
    }


def log_indices(k: int, most: int) -> NDArray[np.int64]:
    """At most ``most`` of the indices below k, dense at the beginning, with the first and the last.

    Examples
    --------
    >>> log_indices(4, 64).tolist(), log_indices(100, 8).tolist()
    ([0, 1, 2, 3], [0, 1, 3, 6, 13, 26, 51, 99])
    """
    return np.unique(np.geomspace(1, k, most).round().astype(np.int64)) - 1


def _columns(record: Spectra) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Last step of each column, and the column of each row of ``record.events``."""
    steps, place = np.unique(record.events["t"], return_inverse=True)
    count = min(len(steps), COLUMNS)
    column = np.arange(len(steps)) * count // len(steps)
    last = np.flatnonzero(np.diff(column, append=count))
    return steps[last], column[place]


def _matrix(record: Spectra, field: str, columns: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """The last finite value of each layer in each column; NaN for none."""
    events = record.events
    values = events[field].astype(np.float64)
    matrix = np.full((len(record), count), np.nan)
    known = np.isfinite(values)
    # Rows of a layer are in the order of steps, and of two writes to one place the later one stays.
    matrix[events["layer"][known], columns[known]] = values[known]
    return matrix


def _curve(curve: Curve) -> dict[str, Any]:
    rows = spread(len(curve), POINTS)
    return {
        "name": curve.name,
        "step": curve.step[rows].tolist(),
        "wall_s": _or_none(curve.wall_s[rows]),
        "share": _or_none(curve.share[rows]),
        "value": _or_none(curve.value[rows]),
    }


def _step_times(run: Run) -> dict[str, Any]:
    middle, seconds = step_seconds(run)
    rows = spread(len(middle), POINTS)
    return {"step": middle[rows].tolist(), "value": _or_none(1e3 * seconds[rows])}


def _or_none(values: NDArray[np.float64]) -> list[float | None]:
    """JSON knows no NaN; five digits are more than a screen shows."""
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in values.tolist()]
