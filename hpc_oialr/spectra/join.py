"""Many files of a record made one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hpc_oialr.spectra.files import head_of
from hpc_oialr.spectra.hdf5_io import write_record
from hpc_oialr.spectra.layer import Layer
from hpc_oialr.spectra.quantities import spectral_quantities
from hpc_oialr.spectra.reader import Spectra
from hpc_oialr.spectra.rows import LayerRows


def merge(path: Path | str) -> Path:
    """Join all files of a record, side files and those of earlier versions too; returns its path.

    What a run does at its end, for one that was stopped or whose disk was full. No run may be writing there.

    Parameters
    ----------
    path
        A run's folder or its ``spectra.h5``.

    Raises
    ------
    DataError
        If there is none, or a file is damaged; all stay as they are.
    OSError
        If there is no room; all stay as they are.
    """
    head = head_of(Path(path))
    with Spectra(head) as run:
        join(run, head)
    return head


def join(run: Spectra, target: Path) -> None:
    """Write an open record, or some files of it, as one HDF5 file, and remove the others.

    The target is renamed into its place, then the others are removed, newest first: a kill in between leaves rows
    twice. Rows of version 1 get the quantities that follow from their singular values.
    """
    others = [file.path for file in run.files if file.path != target]
    if not others:
        return
    write_record(target, run.attributes, rows_of(run), run.steps)
    for path in reversed(others):
        path.unlink(missing_ok=True)
    # Left by writes that were killed.
    for draft in target.parent.glob(f".{head_of(target).name}*.tmp"):
        draft.unlink(missing_ok=True)


def rows_of(run: Spectra, until: int | None = None) -> Iterator[LayerRows]:
    """Rows of one layer after another, of those that have any."""
    for layer in run.values():
        kept = np.flatnonzero(layer.t <= until) if until is not None else np.arange(len(layer))
        if len(kept):
            yield _rows(layer, kept)


def _rows(layer: Layer, kept: np.ndarray) -> LayerRows:
    events, values = layer.events[kept], layer.singular_values[kept]
    for event, row in zip(events, values, strict=True):
        if np.isnan(event["stable_rank"]):
            for name, figure in spectral_quantities(row[~np.isnan(row)], layer.m, layer.n).items():
                event[name] = figure
    return LayerRows(layer.name, layer.index, layer.m, layer.n, events, values)
