"""One file of a record, open for reading: HDF5, or a flush."""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_oialr.errors import DataError
from hpc_oialr.spectra.files import head_of, is_flush
from hpc_oialr.spectra.schema import EVENT, NO_STEPS, SCHEMA_VERSION, STEP, as_table, group_name

# Up to this size a file is read whole, for it may be replaced while it is open; larger ones are not while a run goes on.
WHOLE_BYTES = 16 * 2**20
# What h5py and NumPy raise for a damaged file.
DAMAGE = (OSError, RuntimeError, KeyError, ValueError, EOFError, zipfile.BadZipFile)


class RecordFile:
    """One file of a record; tables are read when they are asked for.

    FileNotFoundError if it is missing; DataError if it is damaged, no record of spectra, or of a newer schema.
    ``tree`` is what is in it, as h5py shows it; ``attributes`` are those of the root; ``layers`` it has rows of.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity = _identity(path)
        try:
            small = path.stat().st_size <= WHOLE_BYTES
            whole = {"driver": "core", "backing_store": False} if small else {}
            self.tree: Any = (
                _read_flush(path) if is_flush(path) else h5py.File(path, "r", locking=False, **whole)
            )
            self.attributes: dict[str, Any] = dict(self.tree.attrs)
            version = int(self.attributes["schema_version"])
            # A master of earlier versions shows files that lie beside it, and HDF5 shows zeros for a damaged one.
            groups = [] if self.attributes.get("virtual") else list(self.tree.get("layers", ()))
        except FileNotFoundError:
            raise
        except DAMAGE as error:
            raise DataError(
                f"{path} is damaged or no spectra file ({error}). Save what can be read with: "
                f"oialr spectra repair {head_of(path)}"
            ) from error
        if version > SCHEMA_VERSION:
            raise DataError(
                f"{path} has schema version {version}; must be at most {SCHEMA_VERSION}. Update hpc_oialr."
            )
        self._groups = {"" if group == "%" else unquote(group): group for group in groups}
        self.layers = tuple(self._groups)

    def group(self, layer: str) -> Any:
        """Where a layer's tables are."""
        return self.tree["layers"][self._groups[layer]]

    def shape(self, layer: str) -> tuple[int, int, int]:
        """A layer's place in the model, or -1, and its weight's m and n."""
        with self._reading(f"attributes of layers/{self._groups[layer]}"):
            found = self.group(layer).attrs
            return int(found.get("index", -1)), int(found["m"]), int(found["n"])

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
            there = "steps" in self.tree and not self.attributes.get("virtual")
            return as_table(self.tree["steps"][()], STEP) if there else NO_STEPS

    @property
    def replaced(self) -> bool:
        """Whether another file has taken its place since."""
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
        layers[group_name(name)] = _Group({"name": name, "index": index, "m": m, "n": n, "k": k}, tables)
        row, value = row + count, value + count * k
    return _Group(header["attributes"], {"layers": _Group({}, layers), "steps": steps})
