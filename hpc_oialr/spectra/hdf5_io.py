"""One HDF5 file of a record, written at once."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_oialr.outputs import Kind
from hpc_oialr.record.files import draft_of
from hpc_oialr.spectra.rows import LayerRows
from hpc_oialr.spectra.schema import EVENT, NO_STEPS, group_name, root_attributes

# As much is read at once, and lost to one damaged byte.
_ROWS_PER_CHUNK, _CHUNK_BYTES = 32, 1 << 14


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
    with draft_of(path) as draft, _Sink(draft, "w+b") as sink:
        try:
            with h5py.File(sink, "w", libver="v110") as file:
                file.attrs.update(root_attributes(attributes))
                file.create_group("layers", track_order=True)
                for rows in layers:
                    _write_layer(file, rows)
                if len(steps):
                    file.create_dataset("steps", data=steps, **_chunked(len(steps), _ROWS_PER_CHUNK))
        except (OSError, RuntimeError, ValueError):
            # A failed write makes HDF5 fail later too, where it reads back.
            if sink.failure is None:
                raise
        if sink.failure is not None:
            raise sink.failure
        os.fsync(sink.fileno())


class _Sink(io.FileIO):
    """A file that HDF5 writes to, which keeps the first error for later.

    HDF5 cannot close a file whose writes fail: it would hold the file, and its space, until the process ends.
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
    # np.concatenate drops the names of the enumeration; the view restores them.
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


def written_by(command: str) -> Kind:
    """Records that a command wrote: the root's attribute ``written_by`` says so."""

    def is_own(path: Path) -> bool:
        try:
            with h5py.File(path, "r", locking=False) as file:
                return bool(file.attrs.get("written_by") == command)
        except OSError:
            return False

    return Kind(f"a record of {command}", is_own)
