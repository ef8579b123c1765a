"""One HDF5 file of a record: written at once, read lazily."""

from __future__ import annotations

import contextlib
import io
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_oialr.errors import DataError
from hpc_oialr.outputs import Kind
from hpc_oialr.record.files import to_json
from hpc_oialr.spectra.files import head_of
from hpc_oialr.spectra.rows import LayerRows
from hpc_oialr.spectra.schema import EVENT, NO_STEPS, SCHEMA_VERSION, STEP, as_table, group_name

# As much is read at once, and lost to one damaged byte.
_ROWS_PER_CHUNK, _CHUNK_BYTES = 32, 1 << 14
# Up to this size a file is read whole, for it may be replaced while it is open; larger ones are not while a run goes on.
WHOLE_BYTES = 16 * 2**20
# What h5py and NumPy raise for a damaged file.
DAMAGE = (OSError, RuntimeError, KeyError, ValueError, EOFError, zipfile.BadZipFile)
# Attributes that describe a file, not the record; the last two are of earlier versions.
_OF_FILE = ("schema_version", "segments", "virtual")


def plain_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of the root as they are stored: mappings as JSON."""
    kept = {name: value for name, value in attributes.items() if name not in _OF_FILE}
    return {name: to_json(value) if isinstance(value, Mapping) else value for name, value in kept.items()}


def write_record(
    path: Path,
    attributes: Mapping[str, Any],
    layers: Iterable[LayerRows],
    steps: NDArray[np.void] = NO_STEPS,
) -> None:
    """Write a whole file, which then takes its place in one rename. Memory: one layer.

    Raises
    ------
    OSError
        If it cannot be written; what was there is as before.
    """
    draft = path.with_name(f".{path.name}.tmp")
    try:
        with _Sink(draft, "w+b") as sink:
            try:
                with h5py.File(sink, "w", libver="v110") as file:
                    file.attrs.update({"schema_version": SCHEMA_VERSION, **plain_attributes(attributes)})
                    file.create_group("layers", track_order=True)
                    for rows in layers:
                        _write_layer(file, rows)
                    if len(steps):
                        file.create_dataset("steps", data=steps, **_chunked(len(steps), _ROWS_PER_CHUNK))
            except DAMAGE:
                # It could not read back what it believes to have written.
                if sink.failure is None:
                    raise
            if sink.failure is not None:
                raise sink.failure
            os.fsync(sink.fileno())
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


class _Sink(io.FileIO):
    """What HDF5 writes to; the first failure is kept and told afterwards.

    HDF5 cannot close a file that it cannot write, and then holds it, and its space, until the process ends.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while len(left) and self.failure is None:
                left = left[super().write(left) or 0 :]
        except OSError as error:
            self.failure = error
        return size


def _write_layer(file: h5py.File, rows: LayerRows) -> None:
    k, count = min(rows.m, rows.n), len(rows.events)
    group = file["layers"].create_group(group_name(rows.name))
    group.attrs.update({"name": rows.name, "index": rows.index, "m": rows.m, "n": rows.n, "k": k})
    # NumPy drops an enumeration's words when it joins tables; the view has them again.
    events = np.ascontiguousarray(rows.events).view(EVENT)
    group.create_dataset("events", data=events, dtype=EVENT, **_chunked(count, _ROWS_PER_CHUNK))
    per_chunk = max(1, min(_ROWS_PER_CHUNK, _CHUNK_BYTES // (4 * k)))
    group.create_dataset("singular_values", data=rows.singular_values, **_chunked(count, per_chunk, k))


def _chunked(rows: int, per_chunk: int, *width: int) -> dict[str, Any]:
    chunks = (max(1, min(rows, per_chunk)), *width)
    return {
        "chunks": chunks,
        "compression": "gzip",
        "compression_opts": 1,
        "shuffle": True,
        "fletcher32": True,
    }


class RecordFile:
    """One HDF5 file of a record, open for reading.

    Attributes
    ----------
    path
        The file.
    attributes
        Of the root.
    layers
        Names of the layers that it has rows of.

    Raises
    ------
    FileNotFoundError
        If it is missing.
    DataError
        If it is damaged, no record of spectra, or of a newer schema.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            whole = {"driver": "core", "backing_store": False} if path.stat().st_size <= WHOLE_BYTES else {}
            self.file = h5py.File(path, "r", locking=False, **whole)
            self.attributes: dict[str, Any] = dict(self.file.attrs)
            check_version(path, int(self.attributes["schema_version"]))
            # A master of earlier versions shows files that lie beside it, and HDF5 shows zeros for a damaged one.
            groups = [] if self.attributes.get("virtual") else list(self.file.get("layers", ()))
        except FileNotFoundError:
            raise
        except DAMAGE as error:
            raise damaged(path, error) from error
        self._groups = {"" if group == "%" else unquote(group): group for group in groups}
        self.layers = tuple(self._groups)

    def shape(self, layer: str) -> tuple[int, int, int]:
        """A layer's place in the model, or -1, and its weight's m and n."""
        with self._reading(f"attributes of layers/{self._groups[layer]}"):
            found = self.group(layer).attrs
            return int(found.get("index", -1)), int(found["m"]), int(found["n"])

    def group(self, layer: str) -> h5py.Group:
        """Where a layer's tables are."""
        return self.file["layers"][self._groups[layer]]

    def events(self, layer: str) -> NDArray[np.void]:
        """A layer's events, of dtype EVENT."""
        return as_table(self._read(f"layers/{self._groups[layer]}/events"), EVENT)

    def singular_values(self, layer: str, rows: Any = ()) -> NDArray[np.float32]:
        """A layer's singular values, or some rows of them."""
        return self._read(f"layers/{self._groups[layer]}/singular_values", rows)

    @property
    def steps(self) -> NDArray[np.void]:
        """The table of steps, of dtype STEP."""
        if self.attributes.get("virtual"):
            return NO_STEPS
        with self._reading("data set steps"):
            return as_table(self.file["steps"][()], STEP) if "steps" in self.file else NO_STEPS

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _read(self, dataset: str, rows: Any = ()) -> NDArray[Any]:
        with self._reading(f"data set {dataset}"):
            values: NDArray[Any] = np.asarray(self.file[dataset][rows])
            return values

    @contextlib.contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            yield
        except DAMAGE as error:
            raise DataError(
                f"{self.path}: {what} cannot be read; it is damaged ({error}). Save the rest with: "
                f"oialr spectra repair {head_of(self.path)}"
            ) from error


def damaged(path: Path, error: Exception) -> DataError:
    """The error that says so, and what to do."""
    return DataError(
        f"{path} is damaged or no spectra file ({error}). Save what can be read with: "
        f"oialr spectra repair {head_of(path)}"
    )


def check_version(path: Path, version: int) -> None:
    """Raise :class:`DataError` for a newer schema."""
    if version > SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema version {version}; must be at most {SCHEMA_VERSION}. Update hpc_oialr."
        )


def written_by(command: str) -> Kind:
    """Records that a command wrote: the root's attribute ``written_by`` says so."""

    def is_own(path: Path) -> bool:
        try:
            with h5py.File(path, "r", locking=False) as file:
                return bool(file.attrs.get("written_by") == command)
        except OSError:
            return False

    return Kind(f"a record of {command}", is_own)
