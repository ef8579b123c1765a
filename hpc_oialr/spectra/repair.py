"""What can be saved of a damaged record."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_oialr.errors import DataError
from hpc_oialr.outputs import claim
from hpc_oialr.spectra.join import write_rows, written_by
from hpc_oialr.spectra.memory_file import Image, memory_file
from hpc_oialr.spectra.names import files_of
from hpc_oialr.spectra.pieces import DAMAGE
from hpc_oialr.spectra.rows import LayerRows, Rows, together
from hpc_oialr.spectra.schema import EVENT, STEP, as_table

_SIGNATURE, _SUPERBLOCK_BYTES, _OBJECT = b"\x89HDF\r\n\x1a\n", 48, b"OHDR"
# Where a file ends, as its superblock says.
_END = slice(28, 36)
# No checksum of a block of these is such a block, as it is with zeros.
_PADDING = b"\xa5"


@dataclass(frozen=True)
class Salvage:
    """What :func:`repair` did.

    Attributes
    ----------
    target
        The file that it wrote.
    layers, events
        How many layers, and how many rows of events of all layers together, it holds.
    lost
        One sentence for each thing that could not be read.
    """

    target: Path
    layers: int
    events: int
    lost: tuple[str, ...]


def repair(path: Path | str, target: Path | None = None, *, force: bool = False) -> Salvage:
    """Write all rows that can be read into a new file; what is there stays as it is.

    Each chunk of a table has a checksum, and so has each of HDF5's own blocks: what is read is right. A chunk of
    singular values that is lost leaves its events, with NaN. A file that was cut short is padded to its length;
    where the list of layers is lost they are found by the marks of their headers.

    Parameters
    ----------
    path
        A run's folder, its ``spectra.h5``, with all segments and the files of all processes, or one segment.
    target
        What to write; default the path with ``.repaired.h5`` behind.
    force
        Replace a file that is no repaired record; see :func:`hpc_oialr.outputs.claim`.

    Raises
    ------
    DataError
        If nothing can be read.
    OutputError
        If the target is another file than an earlier repaired record.
    """
    path = Path(path)
    head = path / "spectra.h5" if path.is_dir() else path
    target = target or head.with_name(f"{head.name}.repaired.h5")
    files = files_of(head)
    written = claim(target, written_by("oialr spectra repair"), inputs=[*files, head.parent], force=force)
    wrecks = [_Wreck(file) for file in files]
    rows = together([wreck.rows() for wreck in wrecks])
    lost = tuple(sentence for wreck in wrecks for sentence in wreck.lost)
    if not rows:
        raise DataError(f"nothing of {head} can be saved: {' '.join(lost) or 'there is no such file.'}")
    attributes: dict[str, Any] = {}
    for wreck in reversed(wrecks):
        attributes |= wreck.attributes
    write_rows(rows, {**attributes, "written_by": "oialr spectra repair"}, written)
    return Salvage(target, len(rows.layers), sum(len(layer.events) for layer in rows.layers), lost)


@dataclass
class _Wreck:
    """One damaged file.

    Attributes
    ----------
    lost
        Sentences, once :meth:`rows` has read it.
    attributes
        Of the root, as far as they can be read.
    """

    path: Path
    lost: list[str] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)

    def rows(self) -> Rows:
        """All rows that can be read."""
        content = mended(self.path.read_bytes())
        if content is None:
            self._lose("all of it: it is no HDF5 file any more")
            return Rows()
        with contextlib.closing(memory_file(content)) as file:
            with contextlib.suppress(*DAMAGE):
                self.attributes = dict(file.attrs)
            if self.attributes.get("virtual"):
                return Rows()
            layers = [self._layer(name, group) for name, group in self._groups(file, content)]
            return Rows(tuple(layer for layer in layers if layer is not None), self._steps(file, content))

    def _lose(self, what: str) -> None:
        self.lost.append(f"{self.path.name}: {what}.")

    def _groups(self, file: h5py.File, content: bytes) -> Iterator[tuple[str, h5py.Group]]:
        try:
            names = list(file["layers"])
        except DAMAGE:
            self._lose("the list of layers; they were looked for one by one")
            for group in _found(file, content, h5py.Group):
                if "name" in group.attrs:
                    yield str(group.attrs["name"]), group
            return
        for name in names:
            try:
                yield name, file["layers"][name]
            except DAMAGE:
                self._lose(f"layer {unquote(name)!r}, all of it")

    def _layer(self, name: str, group: h5py.Group) -> LayerRows | None:
        try:
            attributes: Mapping[str, Any] = dict(group.attrs)
            label, m, n = str(attributes["name"]), int(attributes["m"]), int(attributes["n"])
            events, whole = _chunks(group["events"])
        except DAMAGE:
            self._lose(f"layer {unquote(name)!r}, all of it")
            return None
        values = np.full((len(events), min(m, n)), np.nan, dtype=np.float32)
        read = np.zeros(len(events), dtype=bool)
        with contextlib.suppress(*DAMAGE):
            found, held = _chunks(group["singular_values"])
            count = min(len(found), len(events))
            read[:count] = held[:count]
            values[read] = found[:count][held[:count]]
        self._tell(f"layer {label!r}", whole, read)
        table = as_table(events[whole], EVENT)
        return LayerRows(label, int(attributes.get("index", -1)), m, n, table, values[whole])

    def _tell(self, name: str, events: NDArray[np.bool_], values: NDArray[np.bool_]) -> None:
        if not events.all():
            self._lose(f"{name}, {np.count_nonzero(~events)} of {len(events)} events")
        bare = np.count_nonzero(events & ~values)
        if bare:
            self._lose(f"{name}, the singular values of {bare} of {len(events)} events")

    def _steps(self, file: h5py.File, content: bytes) -> NDArray[np.void]:
        try:
            if "steps" not in file:
                return np.zeros(0, dtype=STEP)
            steps, whole = _chunks(file["steps"])
        except DAMAGE:
            tables = [
                table for table in _found(file, content, h5py.Dataset) if "step" in (table.dtype.names or ())
            ]
            if not tables:
                self._lose("the table of steps, all of it")
                return np.zeros(0, dtype=STEP)
            steps, whole = _chunks(tables[0])
        if not whole.all():
            self._lose(f"{np.count_nonzero(~whole)} of {len(steps)} rows of steps")
        return as_table(steps[whole], STEP)


def _chunks(dataset: h5py.Dataset) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Rows chunk by chunk, and which of them could be read."""
    values = np.zeros(dataset.shape, dtype=dataset.dtype)
    read = np.zeros(len(values), dtype=bool)
    step = dataset.chunks[0]
    for start in range(0, len(values), step):
        with contextlib.suppress(*DAMAGE):
            values[start : start + step] = dataset[start : start + step]
            read[start : start + step] = True
    return values, read


def mended(content: bytes) -> bytes | None:
    """A file's bytes with what HDF5 needs to open it: the right length, and a whole superblock; None if in vain."""
    if _opens(content):
        return content
    end = int.from_bytes(content[_END], "little") if content.startswith(_SIGNATURE) else 0
    if len(content) < end < 1 << 40:
        padded = content + _PADDING * (end - len(content))
        if _opens(padded):
            return padded
    fresh = _superblock(len(content))
    replaced = fresh + content[len(fresh) :]
    return replaced if fresh and _opens(replaced) else None


def _opens(content: bytes) -> bool:
    try:
        memory_file(content).close()
    except OSError:
        return False
    return True


def _superblock(length: int) -> bytes:
    """The superblock of another file of this length: all that it says is where the file ends."""
    size, content = 1, b""
    for _ in range(2):
        with contextlib.closing(Image()) as image:
            image.file.create_dataset("filling", data=np.zeros(size, dtype=np.uint8))
            content = image.content()
        if len(content) == length:
            return content[:_SUPERBLOCK_BYTES]
        size = max(1, size + length - len(content))
    return b""


def _found(file: h5py.File, content: bytes, kind: type) -> Iterator[Any]:
    """Groups or data sets by the marks of their headers."""
    places, start = [], content.find(_OBJECT)
    while start >= 0:
        places.append(start)
        start = content.find(_OBJECT, start + 1)
    for reference in _references(places):
        with contextlib.suppress(*DAMAGE):
            found = file[reference]
            if isinstance(found, kind):
                yield found


def _references(places: list[int]) -> Iterator[h5py.Reference]:
    """References to objects by their places; HDF5 stores one as just that number."""
    with contextlib.closing(memory_file()) as file:
        table = file.create_dataset(
            "places", shape=(len(places),), dtype=h5py.ref_dtype, chunks=(len(places),)
        )
        table.id.write_direct_chunk((0,), np.array(places, dtype="<u8").tobytes())
        yield from table[:]
