"""Layout of a record of spectra, and updates as rows of its tables.

::

    /                       attributes: schema_version, config, environment, world (JSON), git_commit, seed, world_size
    /layers/NAME            attributes: name, index (its place in the model), m, n, k. NAME is escaped as in URLs
        events              one row per event, of the fields of EVENT
        singular_values     float32  the same rows, of width k: before the cut, descending, padded with NaN
    /steps                  one row per step range, of the fields of STEP

A number that was not computed, or that an older version did not store, is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_oialr.record.files import to_json
from hpc_oialr.record.quantities import spectral_quantities

if TYPE_CHECKING:
    from hpc_oialr.method.report import LayerUpdate, UpdateReport

SCHEMA_VERSION = 2
KINDS = {"stability": 0, "conversion": 1, "update": 2}
KIND = h5py.enum_dtype(KINDS, basetype=np.uint8)
EVENT = np.dtype(
    [
        ("t", np.int64),  # step
        ("kind", KIND),  # a measurement while dense, a conversion or an update
        ("r_before", np.int64),
        ("r", np.int64),  # inner dimension before and after
        ("cut_values", np.int64),  # how many singular values were cut
        ("new_directions", np.int64),  # how many joined the bases then; over r the share of them that is new
        ("stability", np.float64),  # agreement with the basis before; NaN where there was none
        ("orthogonality_error_U", np.float64),
        ("orthogonality_error_Vh", np.float64),
        ("seconds", np.float64),  # time of the SVD
        # Largest principal angle between the leading quarter of the basis and that of the basis before (rad).
        ("subspace_angle_U", np.float64),
        ("subspace_angle_Vh", np.float64),
        # ||R' - R||_F / ||R||_F, R of the weight's QR before, R' now; while dense.
        ("r_factor_distance", np.float64),
        # Of the values before the cut; see hpc_oialr.record.quantities.
        ("stable_rank", np.float64),
        ("effective_rank", np.float64),  # exp of the entropy of s / sum s
        ("noise_edge", np.float64),  # largest singular value that noise alone would have
        ("values_above_edge", np.float64),  # how many stand above it
        ("alpha", np.float64),  # power-law exponent of the tail of s^2; NaN for fewer than 20 values
        ("condition_number", np.float64),  # largest over smallest value
    ]
)
STEP = np.dtype(
    [
        ("step", np.int64),  # last step of the range
        ("loss", np.float64),
        ("lr", np.float64),
        ("trained_parameters", np.int64),
        ("memory_bytes", np.int64),  # highest so far
        ("wall_s", np.float64),  # of training so far
        ("update_s", np.float64),  # of it in updates
        ("data_wait_s", np.float64),  # of it waiting for data
        ("eval_s", np.float64),  # beside it, in evaluations
        ("checkpoint_s", np.float64),  # beside it, in checkpoints
        ("energy_J", np.float64),  # of all ranks since the row before
    ]
)
NO_STEPS = np.zeros(0, dtype=STEP)


def root_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The root's attributes as this version stores them: mappings as JSON."""
    stored = {k: to_json(v) if isinstance(v, Mapping) else v for k, v in attributes.items()}
    return {**stored, "schema_version": SCHEMA_VERSION}


def as_table(rows: NDArray[np.void], table: np.dtype[np.void]) -> NDArray[np.void]:
    """Rows of any version in the dtype of this one: missing fields are NaN, unknown ones are dropped."""
    if rows.dtype == table:
        return rows
    converted = np.zeros(len(rows), dtype=table)
    for name in table.names or ():
        if rows.dtype.names and name in rows.dtype.names:
            converted[name] = rows[name]
        elif table[name].kind == "f":
            converted[name] = np.nan
    return converted


def kind_words(kinds: NDArray[np.uint8]) -> list[str]:
    """Names of the numbers in ``kind``.

    >>> kind_words(np.array([0, 2], dtype=np.uint8))
    ['stability', 'update']
    """
    words = list(KINDS)
    return [words[int(number)] for number in kinds]


def group_name(layer: str) -> str:
    """A layer's name as one HDF5 link: "/" would start a subgroup, "." means the group itself.

    >>> group_name("encoder.0/a"), group_name("."), group_name("")
    ('encoder.0%2Fa', '%2E', '%')
    """
    if not layer:
        return "%"
    return layer.replace(".", "%2E") if not layer.strip(".") else quote(layer, safe=" .,:;@+-_()[]")


@dataclass(frozen=True)
class LayerRows:
    """Rows of one layer."""

    name: str
    index: int  # its position in the model
    m: int
    n: int
    events: NDArray[np.void]  # of dtype EVENT; shape (rows,)
    singular_values: NDArray[np.float32]  # padded with NaN; shape (rows, k)


@dataclass(frozen=True)
class Rows:
    """Rows that are added to a record in one write: each layer once, step ranges, and the number of updates."""

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

    @property
    def first_step(self) -> int:
        """The earliest step that has a row."""
        return int(min([*(rows.events["t"].min() for rows in self.layers), *self.steps["step"]]))


def copied(report: UpdateReport) -> UpdateReport:
    """With copies of the singular values, which may be views of an SVD's much larger result; about 5 us a layer."""
    values: list[Any] = [np.asarray(each.singular_values).astype(np.float32) for each in report.layers]
    layers = zip(report.layers, values, strict=True)
    return replace(report, layers=tuple(replace(each, singular_values=own) for each, own in layers))


def rows_of_update(report: UpdateReport, places: Mapping[str, int]) -> Rows:
    """An update as rows, with all quantities of its singular values; ``places``: each layer's index in the model."""
    return Rows(tuple(_layer_rows(report, layer, places[layer.name]) for layer in report.layers), events=1)


def _layer_rows(report: UpdateReport, layer: LayerUpdate, index: int) -> LayerRows:
    s = np.asarray(layer.singular_values).astype(np.float32, copy=False)
    values = np.full((1, min(layer.m, layer.n)), np.nan, dtype=np.float32)
    values[0, : len(s)] = s
    figures = {"t": report.t, "kind": KINDS[report.kind], **spectral_quantities(s, layer.m, layer.n)}
    fields = [figures[name] if name in figures else getattr(layer, name) for name in EVENT.names or ()]
    row = tuple(math.nan if value is None else value for value in fields)
    return LayerRows(layer.name, index, layer.m, layer.n, np.array([row], dtype=EVENT), values)


def together(batch: Sequence[Rows]) -> Rows:
    """Concatenate rows, layer by layer."""
    if len(batch) == 1:
        return batch[0]
    grouped: dict[str, list[LayerRows]] = {}
    for rows in batch:
        for layer in rows.layers:
            grouped.setdefault(layer.name, []).append(layer)
    layers = (
        replace(
            same[0],
            events=np.concatenate([rows.events for rows in same]),
            singular_values=np.concatenate([rows.singular_values for rows in same]),
        )
        for same in grouped.values()
    )
    steps = np.concatenate([NO_STEPS, *(rows.steps for rows in batch)])
    return Rows(tuple(layers), steps, sum(rows.events for rows in batch))


def steps_of(rows: Sequence[Mapping[str, float]]) -> Rows:
    """Rows of the table of steps; a missing number is NaN."""
    fields = STEP.names or ()
    table = [tuple(row.get(name, math.nan) for name in fields) for row in rows]
    return Rows(steps=np.array(table, dtype=STEP))
