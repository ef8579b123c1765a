"""What a record of spectra holds: the one place that says so.

::

    /                       attributes: schema_version, config, environment, world (JSON), git_commit, seed, world_size
    /layers/NAME            attributes: name, index (its place in the model), m, n, k. NAME is escaped as in URLs
        events              one row per event, of the fields of EVENT
        singular_values     float32  the same rows, of width k: descending, padded with NaN
    /steps                  one row per step range, of the fields of STEP

Fields of EVENT::

    t                       int64    step
    kind                    enum     stability (measured while dense), conversion, update
    r_before, r             int64    inner dimension before and after
    cut_values              int64    how many singular values were cut
    stability               float64  agreement with the basis before; NaN where there was none
    orthogonality_error_U, orthogonality_error_Vh    float64
    seconds                 float64  time of the SVD
    subspace_angle_U, subspace_angle_Vh    float64  largest principal angle between the leading quarter of the
                            basis and that of the basis before (rad)
    r_factor_distance       float64  ||R' - R||_F / ||R||_F, R of the weight's QR before, R' now; while dense
    stable_rank             float64  of the values before the cut, as all that follow
    effective_rank          float64  exp of the entropy of s / sum s
    noise_edge              float64  largest singular value that noise alone would have
    values_above_edge       float64  how many stand above it
    alpha                   float64  power-law exponent of the tail of s^2; NaN for fewer than 20 values
    condition_number        float64  largest over smallest value

Fields of STEP::

    step                    int64    last step of the range
    loss, lr                float64  at that step
    trained_parameters      int64
    memory_bytes            int64    highest so far
    wall_s                  float64  seconds of training so far
    update_s, data_wait_s   float64  of it in updates and waiting for data
    eval_s, checkpoint_s    float64  beside it, in evaluations and checkpoints
    energy_J                float64  of all processes since the row before

A number that was not computed, or that a file of an older version does not have, is NaN. Version 1 had the
fields up to ``seconds``, and no steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_oialr.record.files import to_json

SCHEMA_VERSION = 2
KINDS = {"stability": 0, "conversion": 1, "update": 2}
KIND = h5py.enum_dtype(KINDS, basetype=np.uint8)

MEASURES = (
    "stability",
    "orthogonality_error_U",
    "orthogonality_error_Vh",
    "seconds",
    "subspace_angle_U",
    "subspace_angle_Vh",
    "r_factor_distance",
    "stable_rank",
    "effective_rank",
    "noise_edge",
    "values_above_edge",
    "alpha",
    "condition_number",
)
EVENT = np.dtype(
    [
        ("t", np.int64),
        ("kind", KIND),
        ("r_before", np.int64),
        ("r", np.int64),
        ("cut_values", np.int64),
        *((name, np.float64) for name in MEASURES),
    ]
)
STEP = np.dtype(
    [
        ("step", np.int64),
        ("loss", np.float64),
        ("lr", np.float64),
        ("trained_parameters", np.int64),
        ("memory_bytes", np.int64),
        ("wall_s", np.float64),
        ("update_s", np.float64),
        ("data_wait_s", np.float64),
        ("eval_s", np.float64),
        ("checkpoint_s", np.float64),
        ("energy_J", np.float64),
    ]
)


NO_STEPS = np.zeros(0, dtype=STEP)


def root_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The root's attributes as a file of this version stores them: mappings as JSON."""
    stored = {
        name: to_json(value) if isinstance(value, Mapping) else value for name, value in attributes.items()
    }
    # These describe a file, not the record; the last two are of earlier versions.
    for name in ("schema_version", "segments", "virtual"):
        stored.pop(name, None)
    return {"schema_version": SCHEMA_VERSION, **stored}


def as_table(rows: NDArray[np.void], table: np.dtype[np.void]) -> NDArray[np.void]:
    """Rows of any version as those of this one: what is missing is NaN, what is unknown is left out."""
    if rows.dtype == table:
        return rows
    taken = np.zeros(len(rows), dtype=table)
    for name in table.names or ():
        if rows.dtype.names and name in rows.dtype.names:
            taken[name] = rows[name]
        elif table[name].kind == "f":
            taken[name] = np.nan
    return taken


def kind_words(kinds: NDArray[np.uint8]) -> list[str]:
    """Numbers of ``kind`` in words.

    Examples
    --------
    >>> kind_words(np.array([0, 2], dtype=np.uint8))
    ['stability', 'update']
    """
    words = {number: word for word, number in KINDS.items()}
    return [words[int(number)] for number in kinds]


def group_name(layer: str) -> str:
    """A layer's name as one HDF5 link: "/" would open a group, "." means the group itself.

    Examples
    --------
    >>> group_name("encoder.0/a"), group_name("."), group_name("")
    ('encoder.0%2Fa', '%2E', '%')
    """
    if not layer:
        return "%"
    return layer.replace(".", "%2E") if not layer.strip(".") else quote(layer, safe=" .,:;@+-_()[]")
