"""Many files of one record made into one plain file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpc_oialr.outputs import Kind
from hpc_oialr.spectra.layout import describe, write_whole
from hpc_oialr.spectra.pieces import Piece
from hpc_oialr.spectra.quantities import spectral_quantities
from hpc_oialr.spectra.reader import Layer, Spectra
from hpc_oialr.spectra.rows import LayerRows, Rows


def join(paths: Sequence[Path], target: Path, *, segments: int = 0, until: int | None = None) -> None:
    """Write all rows of some files into one, which then takes the target's place in one rename.

    Rows of older versions get the figures that follow from their singular values. Memory: one layer.

    Parameters
    ----------
    segments
        How many closed segments come before the target.
    until
        Leave out rows of later steps.

    Raises
    ------
    DataError
        If one of the files is damaged; the target is as before.
    OSError
        If it cannot be written; the target is as before.
    """
    with contextlib.ExitStack() as stack:
        pieces = [stack.enter_context(contextlib.closing(Piece(path))) for path in paths]
        write_record(Spectra(target, pieces), target, segments=segments, until=until)


def rows_in(run: Spectra) -> Rows:
    """All rows of an open record."""
    return Rows(
        tuple(_rows(layer, None) for layer in run.values()), run.steps, len(np.unique(run.events["t"]))
    )


def write_record(
    run: Spectra,
    target: Path,
    *,
    segments: int = 0,
    until: int | None = None,
    unless: Callable[[], bool] = lambda: False,
) -> bool:
    """Write an open record as one plain file; see :func:`join`.

    Parameters
    ----------
    unless
        Asked at the last moment.

    Returns
    -------
    Whether the target was written.
    """
    with _draft(target, run.attributes, segments) as file:
        _fill(file, run, until)
    return _publish(target, unless)


def write_rows(rows: Rows, attributes: Mapping[str, Any], target: Path) -> None:
    """Write rows as one plain file."""
    with _draft(target, attributes, 0) as file:
        write_whole(file, rows)
    _publish(target, lambda: False)


def written_by(command: str) -> Kind:
    """Records that a command wrote: the root's attribute ``written_by`` says so."""

    def is_own(path: Path) -> bool:
        try:
            with h5py.File(path, "r", locking=False) as file:
                return bool(file.attrs.get("written_by") == command)
        except OSError:
            return False

    return Kind(f"a record of {command}", is_own)


@contextlib.contextmanager
def _draft(target: Path, attributes: Mapping[str, Any], segments: int) -> Iterator[h5py.File]:
    path = _draft_path(target)
    own = ("schema_version", "segments", "virtual")
    try:
        with h5py.File(path, "w", libver="v110", locking=False) as file:
            describe(file, {key: value for key, value in attributes.items() if key not in own}, segments)
            yield file
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _publish(target: Path, unless: Callable[[], bool]) -> bool:
    path = _draft_path(target)
    with path.open("rb") as written:
        os.fsync(written.fileno())
    if unless():
        path.unlink()
        return False
    path.replace(target)
    return True


def _draft_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.join.tmp")


def _fill(file: h5py.File, run: Spectra, until: int | None) -> None:
    for layer in run.values():
        rows = _rows(layer, until)
        if len(rows.events):
            write_whole(file, Rows((rows,)))
    write_whole(file, Rows(steps=run.steps if until is None else run.steps[run.steps["step"] <= until]))


def _rows(layer: Layer, until: int | None) -> LayerRows:
    kept = slice(None) if until is None else layer.t <= until
    events, values = layer.events[kept].copy(), layer.singular_values[kept]
    for event, row in zip(events, values, strict=True):
        if np.isnan(event["stable_rank"]):
            for name, figure in spectral_quantities(row[~np.isnan(row)], layer.m, layer.n).items():
                event[name] = figure
    return LayerRows(layer.name, layer.index, layer.m, layer.n, events, values)
