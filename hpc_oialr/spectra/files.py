"""The files of a record: their names, and how each is written and read.

The record of ``runs/first`` is ``runs/first/spectra.h5`` once the run has ended. Until then it is a chain of numbered
files, oldest rows first::

    spectra.h5, spectra.h5.001, spectra.h5.002        HDF5, number 0, 1, 2: many flushes joined
    spectra.h5.003.npz, spectra.h5.004.npz, ...       one flush each, not joined yet

A file is written under a temporary name, then renamed, and never changed in place. A kill between the join of some
files and their removal leaves rows twice; readers take each row once.

A flush is a ``.npz`` of ``header`` (JSON: attributes of the root; name, index, m, n and count of rows of each layer),
``events`` and ``singular_values`` (layer after layer), and ``steps``. The zip's checksums reveal damage.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_oialr.errors import DataError
from hpc_oialr.outputs import Kind
from hpc_oialr.record.files import draft_of, to_json, write_atomically
from hpc_oialr.spectra.schema import (
    EVENT,
    NO_STEPS,
    SCHEMA_VERSION,
    STEP,
    LayerRows,
    Rows,
    as_table,
    group_name,
    root_attributes,
)

# Files up to this size are read whole: a run may replace them while they are open, but not larger ones.
WHOLE_BYTES = 16 * 2**20
# What h5py and NumPy raise for a damaged file.
DAMAGE = (OSError, RuntimeError, KeyError, ValueError, EOFError, zipfile.BadZipFile)
_NAME = re.compile(r"^(.+?)(?:\.(\d{3,})(?:\.npz)?)?$")
# NumPy's files cannot store the names of an enumeration.
_EVENT = np.dtype([(name, EVENT[name].str) for name in EVENT.names or ()])
# The unit of reading, and of loss by one damaged byte.
_ROWS_PER_CHUNK, _CHUNK_BYTES = 32, 1 << 14

# -- names ---------------------------------------------------------------------------------------


def head_of(path: Path) -> Path:
    """The ``spectra.h5`` of a run's folder, of one of its segments, or the path itself.

    >>> head_of(Path("run/spectra.h5.007")).as_posix()
    'run/spectra.h5'
    """
    return path / "spectra.h5" if path.is_dir() else path.with_name(_NAME.sub(r"\1", path.name))


def number_of(path: Path) -> int:
    """A file's number in its chain; 0 for the head."""
    return int(_NAME.sub(r"\2", path.name) or 0)


def is_flush(path: Path) -> bool:
    """Whether a file holds one flush."""
    return path.suffix == ".npz"


def segment_path(head: Path, number: int, *, flush: bool = False) -> Path:
    """The file of this number.

    >>> head = Path("spectra.h5")
    >>> [segment_path(head, n).name for n in (0, 7)], segment_path(head, 0, flush=True).name
    (['spectra.h5', 'spectra.h5.007'], 'spectra.h5.000.npz')
    """
    suffix = ".npz" if flush else ""
    return head.with_name(f"{head.name}.{number:03d}{suffix}") if number or flush else head


def record_files(head: Path) -> list[Path]:
    """All files of a record, oldest rows first; a joined file comes before the flush of its number."""
    listed = head.parent.iterdir() if head.parent.is_dir() else ()
    found = [path for path in listed if path.is_file() and head_of(path) == head]
    return sorted(found, key=lambda path: (number_of(path), is_flush(path)))


def gaps_in(chain: Sequence[Path]) -> list[Path]:
    """Files of a record that are missing between the given ones, or before them."""
    numbers = {number_of(path) for path in chain}
    return [segment_path(head_of(chain[0]), n) for n in range(max(numbers, default=0)) if n not in numbers]


# -- writing -------------------------------------------------------------------------------------


def write_flush(path: Path, attributes: Mapping[str, Any], rows: Rows) -> None:
    """Write one flush; OSError if that fails, and an older file is kept."""
    layers = [[each.name, each.index, each.m, each.n, len(each.events)] for each in rows.layers]
    header = to_json({"attributes": root_attributes(attributes), "layers": layers})
    events = [each.events.astype(_EVENT) for each in rows.layers]
    values = [each.singular_values.ravel() for each in rows.layers]
    content = io.BytesIO()
    np.savez(
        content,
        header=np.frombuffer(header.encode(), dtype=np.uint8),
        events=np.concatenate([np.zeros(0, dtype=_EVENT), *events]),
        singular_values=np.concatenate([np.zeros(0, dtype=np.float32), *values]),
        steps=rows.steps,
    )
    write_atomically(path, content.getvalue())


def write_record(
    path: Path, attributes: Mapping[str, Any], layers: Iterable[LayerRows], steps: NDArray[np.void] = NO_STEPS
) -> None:
    """Write an HDF5 file; OSError if that fails, and an older file is kept. Needs memory for one layer."""
    with draft_of(path) as draft, _Sink(draft, "w+b") as sink:
        try:
            with h5py.File(sink, "w", libver="v110") as file:
                file.attrs.update(root_attributes(attributes))
                file.create_group("layers", track_order=True)
                for rows in layers:
                    group = file["layers"].create_group(group_name(rows.name))
                    group.attrs.update(_shape_of(rows.name, rows.index, rows.m, rows.n))
                    # np.concatenate drops the names of the enumeration; the view restores them.
                    _write_table(group, "events", np.ascontiguousarray(rows.events).view(EVENT))
                    _write_table(group, "singular_values", rows.singular_values)
                if len(steps):
                    _write_table(file, "steps", steps)
        except (OSError, RuntimeError, ValueError):
            # After a failed write HDF5 fails again where it reads back.
            if sink.failure is None:
                raise
        if sink.failure is not None:
            raise sink.failure
        os.fsync(sink.fileno())


class _Sink(io.FileIO):
    """A file for HDF5 that stores the first error: HDF5 never closes a file whose writes fail, nor frees its space."""

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


def _shape_of(name: str, index: int, m: int, n: int) -> dict[str, Any]:
    return {"name": name, "index": index, "m": m, "n": n, "k": min(m, n)}


def _write_table(group: h5py.Group, name: str, rows: NDArray[Any]) -> None:
    most = _ROWS_PER_CHUNK if rows.ndim == 1 else max(1, min(_ROWS_PER_CHUNK, _CHUNK_BYTES // (4 * rows.shape[1])))
    chunks = (max(1, min(len(rows), most)), *rows.shape[1:])
    packed = {"compression": "gzip", "compression_opts": 1, "shuffle": True, "fletcher32": True}
    group.create_dataset(name, data=rows, chunks=chunks, **packed)


def written_by(command: str) -> Kind:
    """Records whose root has ``command`` as attribute ``written_by``."""

    def is_own(path: Path) -> bool:
        try:
            with h5py.File(path, "r", locking=False) as file:
                return bool(file.attrs.get("written_by") == command)
        except OSError:
            return False

    return Kind(f"a record of {command}", is_own)


# -- reading -------------------------------------------------------------------------------------


class RecordFile:
    """One file of a record; tables are read on demand. ``tree``: its content as h5py shows it.

    FileNotFoundError if it is missing; DataError if it is damaged, no record of spectra, or of a newer schema.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity = _identity(path)
        try:
            small = path.stat().st_size <= WHOLE_BYTES
            whole = {"driver": "core", "backing_store": False} if small else {}
            self.tree: Any = _read_flush(path) if is_flush(path) else h5py.File(path, "r", locking=False, **whole)
            self.attributes: dict[str, Any] = dict(self.tree.attrs)
            version = int(self.attributes["schema_version"])
            # Neither get() nor "in": for both an object whose header is damaged is not there.
            groups = list(self.tree["layers"])
        except FileNotFoundError:
            raise
        except DAMAGE as error:
            raise DataError(
                f"{path} is damaged or no spectra file ({error}). Save what can be read with: "
                f"oialr spectra repair {head_of(path)}"
            ) from error
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{path} has schema version {version}; must be {SCHEMA_VERSION}. Read it with the version of hpc_oialr "
                "that wrote it, or a newer one."
            )
        self._groups = {"" if group == "%" else unquote(group): group for group in groups}
        self.layers = tuple(self._groups)

    def group(self, layer: str) -> Any:
        """The group of a layer's tables."""
        return self.tree["layers"][self._groups[layer]]

    def shape(self, layer: str) -> tuple[int, int, int]:
        """A layer's index in the model, and its weight's m and n."""
        with self._reading(f"attributes of layers/{self._groups[layer]}"):
            found = self.group(layer).attrs
            return int(found["index"]), int(found["m"]), int(found["n"])

    def events(self, layer: str) -> NDArray[np.void]:
        """A layer's events, of dtype EVENT."""
        return as_table(self._read(layer, "events"), EVENT)

    def singular_values(self, layer: str, rows: Any = ()) -> NDArray[np.float32]:
        """A layer's singular values, or some rows of them."""
        return self._read(layer, "singular_values", rows)

    @property
    def steps(self) -> NDArray[np.void]:
        """The table of steps, of dtype STEP."""
        with self._reading("data set steps"):
            return as_table(self.tree["steps"][()], STEP) if "steps" in list(self.tree) else NO_STEPS

    @property
    def replaced(self) -> bool:
        """Whether another file has replaced it since."""
        return _identity(self.path) != self._identity

    def close(self) -> None:
        """Close the file."""
        self.tree.close()

    def _read(self, layer: str, table: str, rows: Any = ()) -> NDArray[Any]:
        with self._reading(f"data set layers/{self._groups[layer]}/{table}"):
            return np.asarray(self.group(layer)[table][rows])

    @contextlib.contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            yield
        except DAMAGE as error:
            raise DataError(
                f"{self.path}: {what} cannot be read; it is damaged ({error}). Save the rest with: "
                f"oialr spectra repair {head_of(self.path)}"
            ) from error


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


class _Group(dict[str, Any]):
    """Tables and groups by name, with attributes, as h5py has them."""

    def __init__(self, attributes: Mapping[str, Any], content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.attrs = attributes

    def close(self) -> None:
        """Nothing is open."""


def _read_flush(path: Path) -> _Group:
    """A flush as it would be in HDF5."""
    content = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if bad := archive.testzip():
            raise ValueError(f"checksum of {bad}")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        header = json.loads(arrays["header"].tobytes())
        events, values, steps = arrays["events"], arrays["singular_values"], arrays["steps"]
    layers, row, value = {}, 0, 0
    for name, index, m, n, count in header["layers"]:
        k = min(m, n)
        tables = {
            "events": events[row : row + count],
            "singular_values": values[value : value + count * k].reshape(count, k),
        }
        layers[group_name(name)] = _Group(_shape_of(name, index, m, n), tables)
        row, value = row + count, value + count * k
    return _Group(header["attributes"], {"layers": _Group({}, layers), "steps": steps})
