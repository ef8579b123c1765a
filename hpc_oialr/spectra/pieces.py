"""The HDF5 files that make up one record, open for reading and seen at one moment."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_oialr.errors import DataError
from hpc_oialr.spectra.memory_file import memory_file
from hpc_oialr.spectra.names import is_segment, parts_of, segment_path, segments_of, sides_of
from hpc_oialr.spectra.schema import SCHEMA_VERSION

# Up to this size a file is read whole: the head of a running job may be replaced at any moment.
_WHOLE_BYTES = 32 * 2**20
_TRIES, _PAUSE_S = 5, 0.05
# What h5py raises for a damaged file.
DAMAGE = (OSError, RuntimeError, KeyError, ValueError)


class Piece:
    """One HDF5 file of a record.

    Parameters
    ----------
    path
        The file.

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
            self.file = _opened(path)
            version = int(self.file.attrs["schema_version"])
            self.layers = list(self.file["layers"]) if "layers" in self.file else []
        except FileNotFoundError:
            raise
        except DAMAGE as error:
            raise DataError(
                f"{path} is damaged or no spectra file ({error}). Save what can be read with: "
                f"oialr spectra repair {path}"
            ) from error
        _check_version(path, version)

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the root."""
        with self.reading("the root's attributes"):
            return dict(self.file.attrs)

    def layer_attributes(self, group: str) -> dict[str, Any]:
        """Attributes of a layer's group."""
        with self.reading(f"attributes of layers/{group}"):
            return dict(self.file["layers"][group].attrs)

    def read(self, dataset: str, rows: Any = ()) -> NDArray[Any]:
        """A data set, or some rows of it.

        Raises
        ------
        DataError
            If it is damaged; names it.
        """
        with self.reading(f"data set {dataset}"):
            values: NDArray[Any] = np.asarray(self.file[dataset][rows])
            return values

    def rows(self, dataset: str) -> int:
        """How many rows a data set has; 0 if there is none."""
        with self.reading(f"data set {dataset}"):
            return len(self.file[dataset]) if dataset in self.file else 0

    @contextlib.contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """Turn an error of h5py into one that names file and part."""
        try:
            yield
        except DAMAGE as error:
            raise DataError(
                f"{self.path}: {what} cannot be read; it is damaged ({error}). Save the rest with: "
                f"oialr spectra repair {self.path}"
            ) from error

    def read_all(self) -> None:
        """Read everything, so that any damage shows."""
        for group in self.layers:
            self.layer_attributes(group)
            for dataset in ("events", "singular_values"):
                self.read(f"layers/{group}/{dataset}")
        if self.rows("steps"):
            self.read("steps")

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def open_pieces(path: Path) -> list[Piece]:
    """All files of a record, in the order in which they were written.

    Parameters
    ----------
    path
        A run's folder, its ``spectra.h5``, or one segment alone.

    Raises
    ------
    DataError
        If there is nothing, or a file is damaged or missing.
    """
    head = path / "spectra.h5" if path.is_dir() else path
    missing: Path | None = None
    for _ in range(_TRIES):
        try:
            pieces = [Piece(head)] if is_segment(head) else _record(head)
        except DataError:
            raise
        except FileNotFoundError as error:
            # Joined, or begun anew, between two looks.
            missing = Path(error.filename or head)
            time.sleep(_PAUSE_S if missing != head else 0)
            continue
        if pieces:
            return pieces
        missing = head
        break
    if missing == head:
        raise DataError(f"{head} does not exist; must be the spectra.h5 of a run.")
    raise DataError(f"{missing} does not exist; it is a part of {head}, whose earlier rows it holds.")


def _record(head: Path) -> list[Piece]:
    """The head with its segments, then those of all processes, then what went on elsewhere."""
    pieces = _chain(head)
    for part in parts_of(head):
        pieces += _chain(part)
    for side in sides_of(head, side_folders(pieces)).values():
        pieces += _chain(side)
    return pieces


def side_folders(pieces: list[Piece]) -> list[str | None]:
    """Folders in which a record may have gone on: the usual one, and ``record.side_folder`` of its settings."""
    if not pieces:
        return [None]
    config = json.loads(pieces[-1].attributes.get("config", "{}"))
    named: str | None = (config.get("record") or {}).get("side_folder")
    return [None] if named is None else [None, named]


def _chain(head: Path) -> list[Piece]:
    """A head after the closed segments that it counts; the segments alone while it is missing."""
    if not head.exists():
        return [Piece(path) for path in segments_of(head).values()]
    last = Piece(head)
    attributes = last.attributes
    if attributes.get("virtual"):
        # Only points to the parts, which are read themselves: HDF5 passes a damaged part over in silence.
        last.close()
        return []
    count = int(attributes.get("segments", 0))
    return [*(Piece(segment_path(head, number)) for number in range(1, count + 1)), last]


def _opened(path: Path) -> h5py.File:
    # A segment never changes: of it only what is asked for is read.
    if path.stat().st_size > _WHOLE_BYTES or is_segment(path):
        return h5py.File(path, "r", locking=False)
    return memory_file(path.read_bytes())


def _check_version(path: Path, version: int) -> None:
    if version > SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema version {version}; must be at most {SCHEMA_VERSION}. Update hpc_oialr."
        )
