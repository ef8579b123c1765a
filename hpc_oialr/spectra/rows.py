"""Updates of the method as rows of the record's tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpc_oialr.spectra.quantities import spectral_quantities
from hpc_oialr.spectra.schema import EVENT, KINDS, NO_STEPS, STEP

if TYPE_CHECKING:
    from hpc_oialr.method.report import LayerUpdate, UpdateReport

# Fields that the event has; the others follow from the singular values.
_OF_LAYER = (
    "r_before",
    "r",
    "cut_values",
    "stability",
    "orthogonality_error_U",
    "orthogonality_error_Vh",
    "seconds",
    "subspace_angle_U",
    "subspace_angle_Vh",
    "r_factor_distance",
)


@dataclass(frozen=True)
class LayerRows:
    """Rows of one layer.

    Attributes
    ----------
    name, index, m, n
        The layer, its position in the model, and its weight's shape.
    events
        Of dtype EVENT; shape (rows,).
    singular_values
        float32, padded with NaN; shape (rows, k).
    """

    name: str
    index: int
    m: int
    n: int
    events: NDArray[np.void]
    singular_values: NDArray[np.float32]


@dataclass(frozen=True)
class Rows:
    """Rows that are added to a record in one write.

    Attributes
    ----------
    layers
        Rows of layers, each layer once.
    steps
        Of dtype STEP; shape (rows,).
    events
        How many events these are.
    """

    layers: tuple[LayerRows, ...] = ()
    steps: NDArray[np.void] = field(default_factory=lambda: NO_STEPS)
    events: int = 0

    def __bool__(self) -> bool:
        return bool(self.layers) or len(self.steps) > 0

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        of_layers = sum(rows.events.nbytes + rows.singular_values.nbytes for rows in self.layers)
        return of_layers + self.steps.nbytes


def copied(report: UpdateReport) -> UpdateReport:
    """With a copy of the singular values, which may be views of an SVD's much larger result; about 5 us a layer."""
    values: list[Any] = [np.asarray(each.singular_values).astype(np.float32) for each in report.layers]
    layers = zip(report.layers, values, strict=True)
    return replace(report, layers=tuple(replace(each, singular_values=own) for each, own in layers))


def rows_of_update(report: UpdateReport, places: Mapping[str, int]) -> Rows:
    """An update as rows, with all quantities that follow from the singular values.

    Parameters
    ----------
    places
        Position of each layer in the model.
    """
    return Rows(tuple(_layer_rows(report, layer, places[layer.name]) for layer in report.layers), events=1)


def together(batch: Sequence[Rows]) -> Rows:
    """Concatenate rows, layer by layer."""
    if len(batch) == 1:
        return batch[0]
    grouped: dict[str, list[LayerRows]] = {}
    for rows in batch:
        for layer in rows.layers:
            grouped.setdefault(layer.name, []).append(layer)
    steps = np.concatenate([NO_STEPS, *(rows.steps for rows in batch)])
    return Rows(tuple(_joined(same) for same in grouped.values()), steps, sum(rows.events for rows in batch))


def steps_of(rows: Sequence[Mapping[str, float]]) -> Rows:
    """Rows of the table of steps; a missing number is NaN."""
    names = STEP.names or ()
    return Rows(
        steps=np.array([tuple(row.get(name, math.nan) for name in names) for row in rows], dtype=STEP)
    )


def _joined(same: Sequence[LayerRows]) -> LayerRows:
    first = same[0]
    events = np.concatenate([rows.events for rows in same])
    values = np.concatenate([rows.singular_values for rows in same])
    return LayerRows(first.name, first.index, first.m, first.n, events, values)


def _layer_rows(report: UpdateReport, layer: LayerUpdate, index: int) -> LayerRows:
    s = np.asarray(layer.singular_values).astype(np.float32, copy=False)
    values = np.full((1, min(layer.m, layer.n)), np.nan, dtype=np.float32)
    values[0, : len(s)] = s
    figures: dict[str, float | None] = {name: getattr(layer, name) for name in _OF_LAYER}
    figures |= {"t": report.t, "kind": KINDS[report.kind], **spectral_quantities(s, layer.m, layer.n)}
    known = {name: value for name, value in figures.items() if value is not None}
    row = tuple(known.get(name, math.nan) for name in EVENT.names or ())
    return LayerRows(layer.name, index, layer.m, layer.n, np.array([row], dtype=EVENT), values)
