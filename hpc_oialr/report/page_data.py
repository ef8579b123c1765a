"""Data of a run for the page's charts, thinned so that the page of a long run loads quickly."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_oialr.report.runs import Curve, Run, conversions, spread, step_seconds
from hpc_oialr.spectra import Layer, Spectra
from hpc_oialr.spectra.schema import kind_words

# More columns than a chart has pixels, more steps than a slider has places, more points than a curve shows.
COLUMNS, SPECTRA, INDICES, POINTS = 512, 100, 64, 512
# Singular values below DEPTH times the largest are drawn there, on a logarithmic axis.
DEPTH = 1e-9

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
    """The data of a run for the page's script, as JSON values."""
    record = run.spectra if run.spectra is not None and len(run.spectra.events) else None
    middle, seconds = step_seconds(run)
    rows = spread(len(middle), POINTS)
    return {
        "name": run.name,
        "dense": run.dense,
        "evaluations": _curve(run.evaluations),
        "losses": _curve(run.losses),
        "step_ms": {"step": middle[rows].tolist(), "value": _or_none(1e3 * seconds[rows])},
        "layers": None if record is None else _layers(record, run.last_step),
        "spectra": [] if record is None else [_spectrum(layer) for layer in record.values()],
    }


def _layers(record: Spectra, last_step: int) -> dict[str, Any]:
    """Every quantity that was recorded, as a matrix of layers by steps."""
    events = record.events
    recorded, place = np.unique(events["t"], return_inverse=True)
    # Neighbouring steps share a column, which is named by the last of them.
    count = min(len(recorded), COLUMNS)
    column = np.arange(len(recorded)) * count // len(recorded)
    steps, columns = recorded[np.flatnonzero(np.diff(column, append=count))], column[place]
    quantities = {}
    for field, label in QUANTITIES.items():
        values = events[field].astype(np.float64)
        matrix, known = np.full((len(record), count), np.nan), np.isfinite(values)
        # Rows of a layer are in the order of steps, and of two writes to one place the later one stays.
        matrix[events["layer"][known], columns[known]] = values[known]
        if known.any():
            quantities[field] = {"label": label, "values": floats(matrix)}
    return {
        "names": list(record.layers),
        "k": [layer.k for layer in record.values()],
        "shapes": [f"{layer.m} x {layer.n}" for layer in record.values()],
        "steps": steps.tolist(),
        "recorded_steps": len(recorded),
        "last_step": max(last_step, int(steps[-1])),
        "conversions": conversions(record.values()),
        "quantities": quantities,
    }


def _spectrum(layer: Layer) -> dict[str, Any]:
    """At most 100 of a layer's spectra, each at 64 indices as far apart as a logarithmic axis shows them."""
    rows = spread(len(layer), SPECTRA)
    indices = np.unique(np.geomspace(1, layer.k, INDICES).round().astype(np.int64)) - 1
    events, values = layer.events[rows], layer.singular_values[rows][:, indices]
    largest = np.max(values, where=np.isfinite(values), initial=0.0)
    return {
        "index": (indices + 1).tolist(),
        "values": floats(np.maximum(values, DEPTH * (largest or 1.0))),
        "step": events["t"].tolist(),
        "kind": kind_words(events["kind"]),
        "r_before": events["r_before"].tolist(),
        "r": events["r"].tolist(),
        "noise_edge": _or_none(events["noise_edge"]),
        "above": _or_none(events["values_above_edge"]),
    }


def _curve(curve: Curve) -> dict[str, Any]:
    rows = spread(len(curve), POINTS)
    values = {name: _or_none(getattr(curve, name)[rows]) for name in ("wall_s", "share", "value")}
    return {"name": curve.name, "step": curve.step[rows].tolist(), **values}


def _or_none(values: NDArray[np.float64]) -> list[float | None]:
    """Five digits, more than a screen shows; None for NaN, which JSON lacks."""
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in values.tolist()]


def floats(values: NDArray[Any]) -> str:
    """Little-endian float32 in base64; NaN stays NaN."""
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode("ascii")
