"""``spectra.h5``: every layer's singular values at every event, in a file that is whole at any moment."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpc_oialr.errors import DataError
from hpc_oialr.method.report import LayerUpdate, UpdateReport
from hpc_oialr.record.files import to_json, write_atomically
from hpc_oialr.record.spectra_schema import (
    EVENT,
    ROWS_PER_CHUNK,
    SCHEMA_VERSION,
    LayerSpectra,
    event,
    group_name,
    padded,
)

log = logging.getLogger(__name__)


class SpectraWriter:
    """Adds events to the file; one process of a run has one.

    HDF5 changes a file in place, and one killed meanwhile may never open again. So an event is added to
    a copy in memory, which then takes the file's place in one rename: after a kill at any moment the
    file opens and holds all events whose :meth:`write` had returned, and others may read it while the
    run goes on. HDF5 itself never opens the path, so that file locking, which many parallel file
    systems lack, does not matter. Cost of an event: the file is read and written once (a ViT-B/16's
    file grows to some 20 MB).

    A failing write never ends the training: one warning, then nothing more is recorded.

    Parameters
    ----------
    path
        The file; a damaged one is moved aside, with a warning, and a new one begun.
    attributes
        Root attributes of a new file: ``config`` and ``environment`` (mappings, kept as JSON), ``seed``,
        ``world_size``.
    """

    def __init__(self, path: Path | str, attributes: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.failed = False
        self._attributes = attributes or {}
        self._guarded(self._begin)

    def write(self, report: UpdateReport) -> None:
        """Add an event's layers; when this returns they are in the file."""
        self._guarded(lambda: self._change(lambda file: _append(file, report)))

    def truncate_after(self, t: int) -> None:
        """Drop events of later steps, as a run does that goes on from an older checkpoint."""
        self._guarded(lambda: self._change(lambda file: _truncate(file, t)))

    def _guarded(self, action: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            action()
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            self.failed = True
            log.warning("%s cannot be written (%s); spectra are not recorded any more.", self.path, error)

    def _begin(self) -> None:
        if self.path.exists():
            self._move_aside_if_damaged()
        if not self.path.exists():
            self._change(lambda file: None)

    def _change(self, change: Callable[[h5py.File], None]) -> None:
        image = io.BytesIO(self.path.read_bytes() if self.path.exists() else b"")
        with h5py.File(image, "a", libver="v110") as file:
            if "layers" not in file:
                _describe(file, self._attributes)
            change(file)
        write_atomically(self.path, image.getvalue())

    def _move_aside_if_damaged(self) -> None:
        try:
            # All of it: a damaged chunk shows only when it is read.
            read_spectra(self.path)
        except DataError as error:
            aside = _free_name(self.path)
            self.path.replace(aside)
            log.warning("%s It was moved to %s, and a new file begun.", error, aside.name)


def read_spectra(path: Path | str) -> dict[str, LayerSpectra]:
    """All layers of a file, by name; also while a run writes it.

    Raises
    ------
    DataError
        If the file is missing, damaged, or of a schema this version does not know.
    """
    with _opened(Path(path)) as file:
        return {str(group.attrs["name"]): _layer(group) for group in file["layers"].values()}


def read_attributes(path: Path | str) -> dict[str, Any]:
    """The root attributes; ``config`` and ``environment`` as JSON text.

    Raises
    ------
    DataError
        As :func:`read_spectra`.
    """
    with _opened(Path(path)) as file:
        return dict(file.attrs)


# -- inside the file -----------------------------------------------------------------------------


def _describe(file: h5py.File, attributes: Mapping[str, Any]) -> None:
    file.attrs["schema_version"] = SCHEMA_VERSION
    for name, value in attributes.items():
        file.attrs[name] = to_json(value) if isinstance(value, Mapping) else value
    file.create_group("layers", track_order=True)


def _append(file: h5py.File, report: UpdateReport) -> None:
    for layer in report.layers:
        group = _group(file["layers"], layer)
        events, spectra = group["events"], group["singular_values"]
        rows = len(events)
        events.resize(rows + 1, axis=0)
        spectra.resize(rows + 1, axis=0)
        events[rows] = np.array(event(report, layer), dtype=EVENT)
        spectra[rows] = padded(layer)


def _group(layers: h5py.Group, layer: LayerUpdate) -> h5py.Group:
    name, k = group_name(layer.name), min(layer.m, layer.n)
    if name in layers:
        return layers[name]
    group = layers.create_group(name)
    group.attrs.update({"name": layer.name, "m": layer.m, "n": layer.n, "k": k})
    group.create_dataset(
        "events", shape=(0,), maxshape=(None,), dtype=EVENT, chunks=(ROWS_PER_CHUNK,), fletcher32=True
    )
    group.create_dataset(
        "singular_values",
        shape=(0, k),
        maxshape=(None, k),
        dtype=np.float32,
        chunks=(1, k),
        compression="gzip",
        compression_opts=1,
        shuffle=True,
        fletcher32=True,
    )
    return group


def _truncate(file: h5py.File, t: int) -> None:
    for group in file["layers"].values():
        rows = int(np.count_nonzero(group["events"]["t"] <= t))
        for dataset in group.values():
            dataset.resize(rows, axis=0)


def _layer(group: h5py.Group) -> LayerSpectra:
    attributes, events = group.attrs, group["events"][:]
    return LayerSpectra(
        name=str(attributes["name"]),
        m=int(attributes["m"]),
        n=int(attributes["n"]),
        singular_values=group["singular_values"][:],
        **{name: events[name] for name in events.dtype.names},
    )


# -- the file ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    try:
        # Through Python's own file, so that HDF5 asks for no lock.
        with path.open("rb") as stream, h5py.File(stream, "r") as file:
            _check_version(path, file)
            yield file
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; must be the spectra.h5 of a run.") from error
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise DataError(f"{path} is damaged or no spectra file ({error}).") from error


def _check_version(path: Path, file: h5py.File) -> None:
    version = int(file.attrs["schema_version"])
    if version > SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema version {version}; must be at most {SCHEMA_VERSION}. Update hpc_oialr."
        )


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.damaged{number}") for number in range(1, 1_000_000))
    return next(name for name in names if not name.exists())
