"""What ``spectra.h5`` holds: the one place that says so.

::

    /                       attributes: schema_version, config, environment (JSON), seed, world_size
    /layers/NAME            attributes: name, m, n, k. NAME is escaped as in URLs
        events              one row per event, of fields
            t               int64    step
            kind            enum     stability (measured while dense), conversion, update
            r_before, r     int64    inner dimension before and after
            cut_values      int64    how many singular values were cut
            stability       float64  agreement with the basis before; NaN where there was none
            orthogonality_error_U, orthogonality_error_Vh    float64
            seconds         float64  time of the SVD
        singular_values     float32  the same rows, of width k: descending, padded with NaN

One table of all scalars, since the time of a write goes by the number of data sets.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_oialr.method.report import LayerUpdate, UpdateReport

SCHEMA_VERSION = 1
KINDS = {"stability": 0, "conversion": 1, "update": 2}
ROWS_PER_CHUNK = 32
EVENT = np.dtype(
    [
        ("t", np.int64),
        ("kind", h5py.enum_dtype(KINDS, basetype=np.uint8)),
        ("r_before", np.int64),
        ("r", np.int64),
        ("cut_values", np.int64),
        ("stability", np.float64),
        ("orthogonality_error_U", np.float64),
        ("orthogonality_error_Vh", np.float64),
        ("seconds", np.float64),
    ]
)


@dataclass(frozen=True)
class LayerSpectra:
    """One layer's rows, as NumPy arrays; what each means stands in this file's head.

    ``singular_values`` has shape (rows, k); all others (rows,).
    """

    name: str
    m: int
    n: int
    t: NDArray[np.int64]
    kind: NDArray[np.uint8]
    r_before: NDArray[np.int64]
    r: NDArray[np.int64]
    cut_values: NDArray[np.int64]
    stability: NDArray[np.float64]
    orthogonality_error_U: NDArray[np.float64]
    orthogonality_error_Vh: NDArray[np.float64]
    seconds: NDArray[np.float64]
    singular_values: NDArray[np.float32]

    @property
    def kinds(self) -> list[str]:
        """The events in words."""
        words = {number: word for word, number in KINDS.items()}
        return [words[int(number)] for number in self.kind]


def event(report: UpdateReport, layer: LayerUpdate) -> tuple[float | int, ...]:
    """One layer's row of ``events``."""
    values = {
        "t": report.t,
        "kind": KINDS[report.kind],
        "r_before": layer.r_before,
        "r": layer.r,
        "cut_values": layer.cut_values,
        "stability": float("nan") if layer.stability is None else layer.stability,
        "orthogonality_error_U": layer.orthogonality_error_U,
        "orthogonality_error_Vh": layer.orthogonality_error_Vh,
        "seconds": layer.seconds,
    }
    return tuple(values[name] for name in EVENT.names or ())


def padded(layer: LayerUpdate) -> NDArray[np.float32]:
    """The singular values, NaN up to k."""
    k = min(layer.m, layer.n)
    values = np.full(k, np.nan, dtype=np.float32)
    found = layer.singular_values.detach().float().cpu().numpy()
    values[: len(found)] = found
    return values


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
