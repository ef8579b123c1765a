"""The files that make up a record: their names, and how each is written whole.

The record of ``runs/first`` is ``runs/first/spectra.h5`` once the run has ended. Until then it is a chain of files
with consecutive numbers, each of which holds the rows written after those of the one before::

    spectra.h5, spectra.h5.001, spectra.h5.002        HDF5, number 0, 1, 2: many flushes joined
    spectra.h5.003.npz, spectra.h5.004.npz, ...       one flush each, not joined yet

A file is written under a temporary name, then renamed, and never changed in place. A kill between the join of some
files and their removal leaves rows twice; readers take each row once. Files of ranks (``spectra.p0003.h5``), which
earlier versions could write, are read as further chains of the same record.

A flush is a zip by NumPy of ``header`` (JSON: attributes of the root; name, index, m, n and count of rows of each
layer), ``events`` and ``singular_values`` (layer after layer), and ``steps``. The zip's checksums tell damage.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_oialr.outputs import Kind
from hpc_oialr.record.files import draft_of, to_json, write_atomically
from hpc_oialr.spectra.schema import EVENT, NO_STEPS, LayerRows, Rows, group_name, root_attributes

_NAME = re.compile(r"(?P<head>.+?)(?:\.(?P<number>\d{3,})(?:\.npz)?)?")
# NumPy's files cannot hold the words of an enumeration.
_EVENT = np.dtype([(name, EVENT[name].str) for name in EVENT.names or ()])
# As much is read at once, and lost to one damaged byte.
_ROWS_PER_CHUNK, _CHUNK_BYTES = 32, 1 << 14

# -- names ---------------------------------------------------------------------------------------


def _parts(path: Path) -> tuple[str, int]:
    found = _NAME.fullmatch(path.name)
    return (found["head"], int(found["number"] or 0)) if found else (path.name, 0)


def head_of(path: Path) -> Path:
    """The ``spectra.h5`` of a run's folder, of one of its segments, or the path itself.

    >>> head_of(Path("run/spectra.h5.007")).as_posix()
    'run/spectra.h5'
    """
    return path / "spectra.h5" if path.is_dir() else path.with_name(_parts(path)[0])


def number_of(path: Path) -> int:
    """A file's number in its chain; 0 for the head."""
    return _parts(path)[1]


def is_flush(path: Path) -> bool:
    """Whether a file holds one flush."""
    return path.suffix == ".npz"


def segment_path(head: Path, number: int, *, flush: bool = False) -> Path:
    """The file of this number.

    >>> head = Path("spectra.h5")
    >>> [segment_path(head, n).name for n in (0, 7)], segment_path(head, 0, flush=True).name
    (['spectra.h5', 'spectra.h5.007'], 'spectra.h5.000.npz')
    """
    if flush:
        return head.with_name(f"{head.name}.{number:03d}.npz")
    return head.with_name(f"{head.name}.{number:03d}") if number else head


def chain_of(head: Path) -> list[Path]:
    """All files of one chain, oldest rows first; a joined file comes before the flush of its number."""
    listed = head.parent.iterdir() if head.parent.is_dir() else ()
    found = [path for path in listed if _parts(path)[0] == head.name and path.is_file()]
    return sorted(found, key=lambda path: (number_of(path), is_flush(path)))


def record_files(head: Path) -> list[Path]:
    """All files of a record: its chain, then those of ranks."""
    names = sorted({_parts(path)[0] for path in head.parent.iterdir()}) if head.parent.is_dir() else []
    part = re.compile(rf"{re.escape(head.stem)}\.p\d{{4,}}{re.escape(head.suffix)}")
    heads = [head, *(head.with_name(name) for name in names if part.fullmatch(name))]
    return [path for each in heads for path in chain_of(each)]


def gaps_in(paths: Sequence[Path], least: int = 0) -> list[Path]:
    """Files that are missing, for each chain of which one is there; the first chain has number ``least`` too."""
    missing = []
    for head in dict.fromkeys(map(head_of, paths)):
        numbers = {number_of(path) for path in paths if head_of(path) == head}
        missing += [segment_path(head, n) for n in range(max(*numbers, least) + 1) if n not in numbers]
        least = 0
    return missing


# -- writing -------------------------------------------------------------------------------------


def write_flush(path: Path, attributes: Mapping[str, Any], rows: Rows) -> None:
    """Write one flush; raises OSError if it cannot be written, and what was there is as before."""
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
    path: Path,
    attributes: Mapping[str, Any],
    layers: Iterable[LayerRows],
    steps: NDArray[np.void] = NO_STEPS,
) -> None:
    """Write an HDF5 file; raises OSError if it cannot be written, and what was there is as before. Memory: one layer."""
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
