"""One file that shows those of all processes as one, without copying them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py

from hpc_oialr.record.files import write_atomically
from hpc_oialr.spectra.layout import describe
from hpc_oialr.spectra.memory_file import Image
from hpc_oialr.spectra.names import parts_of
from hpc_oialr.spectra.pieces import Piece

_VIEWED = ("events", "singular_values")


def write_master(head: Path) -> None:
    """Write the head as virtual data sets over the files of all processes, which lie beside it.

    They are named without a folder, so that all may be moved together; any HDF5 reader sees one record. Each of
    them must be one file, see :meth:`SegmentedFile.join`.

    Raises
    ------
    DataError
        If one of the files is damaged.
    """
    with contextlib.ExitStack() as stack:
        files = [path for path in parts_of(head) if path.exists()]
        parts = [stack.enter_context(contextlib.closing(Piece(path))) for path in files]
        if not parts:
            return
        image = stack.enter_context(contextlib.closing(Image()))
        file = image.file
        own = ("schema_version", "segments")
        describe(file, {key: value for key, value in parts[0].attributes.items() if key not in own})
        file.attrs["virtual"] = True
        for group in _in_order(parts):
            _view_layer(file, group, [part for part in parts if group in part.layers])
        _view(file, "steps", [part for part in parts if part.rows("steps")])
        content = image.content()
    write_atomically(head, content)


def _in_order(parts: Sequence[Piece]) -> list[str]:
    """Groups of all layers, in the model's order."""
    places = {group: int(part.layer_attributes(group)["index"]) for part in parts for group in part.layers}
    return sorted(places, key=lambda group: places[group])


def _view_layer(file: h5py.File, group: str, parts: Sequence[Piece]) -> None:
    # A run that went on with another number of processes has dealt its layers anew.
    parts = sorted(parts, key=lambda part: int(part.read(f"layers/{group}/events", 0)["t"]))
    file["layers"].create_group(group).attrs.update(parts[0].layer_attributes(group))
    for name in _VIEWED:
        _view(file, f"layers/{group}/{name}", parts)


def _view(file: h5py.File, name: str, parts: Sequence[Piece]) -> None:
    if not parts:
        return
    shapes: list[Any] = [part.file[name].shape for part in parts]
    layout = h5py.VirtualLayout(
        (sum(shape[0] for shape in shapes), *shapes[0][1:]), parts[0].file[name].dtype
    )
    # HDF5 reads a percent sign as the place of a number.
    source, start = name.replace("%", "%%"), 0
    for part, shape in zip(parts, shapes, strict=True):
        layout[start : start + shape[0]] = h5py.VirtualSource(part.path.name, source, shape)
        start += shape[0]
    file.create_virtual_dataset(name, layout)
