"""Rows into and out of one HDF5 file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_oialr.record.files import to_json
from hpc_oialr.spectra.memory_file import Image
from hpc_oialr.spectra.rows import LayerRows, Rows
from hpc_oialr.spectra.schema import EVENT, SCHEMA_VERSION, STEP, group_name

# While rows come one by one: events in blocks, singular values each row for itself, so that none is compressed twice.
_ROWS_PER_CHUNK = 32
# Of singular values in a file that is written at once: as much is read at once, and lost to one damaged byte.
_CHUNK_BYTES = 1 << 14

_EVENT, _STEP = h5py.h5t.py_create(EVENT, logical=True), h5py.h5t.py_create(STEP, logical=True)
_VALUE = h5py.h5t.py_create(np.dtype(np.float32))

Table = NDArray[Any]


def describe(file: h5py.File, attributes: Mapping[str, Any], segments: int = 0) -> None:
    """Write the root's attributes into a new file; mappings become JSON.

    Parameters
    ----------
    segments
        How many closed segments come before this file.
    """
    file.attrs["schema_version"] = SCHEMA_VERSION
    for name, value in attributes.items():
        file.attrs[name] = to_json(value) if isinstance(value, Mapping) else value
    file.attrs["segments"] = segments
    file.create_group("layers", track_order=True)


def append(image: Image, rows: Rows) -> None:
    """Add rows; a layer that is new gets its group."""
    for layer in rows.layers:
        name = group_name(layer.name)
        if name not in image.file["layers"]:
            make_group(image.file, layer)
        extend(_opened(image, f"layers/{name}/events"), layer.events, _EVENT)
        extend(_opened(image, f"layers/{name}/singular_values"), layer.singular_values, _VALUE)
    if len(rows.steps):
        if "steps" not in image.file:
            make_steps(image.file)
        extend(_opened(image, "steps"), rows.steps, _STEP)


def _opened(image: Image, name: str) -> h5py.Dataset:
    if name not in image.opened:
        image.opened[name] = image.file[name]
    return image.opened[name]


def write_whole(file: h5py.File, rows: Rows) -> None:
    """Write rows into a new file, all at once."""
    for layer in rows.layers:
        group = make_group(file, layer, len(layer.events))
        extend(group["events"], layer.events, _EVENT)
        extend(group["singular_values"], layer.singular_values, _VALUE)
    if len(rows.steps):
        extend(make_steps(file, len(rows.steps)), rows.steps, _STEP)


def make_group(file: h5py.File, layer: LayerRows, rows: int | None = None) -> h5py.Group:
    """A layer's group with empty tables.

    Parameters
    ----------
    rows
        How many will be written at once; None if they come one by one.
    """
    k = min(layer.m, layer.n)
    group = file["layers"].create_group(group_name(layer.name))
    group.attrs.update({"name": layer.name, "index": layer.index, "m": layer.m, "n": layer.n, "k": k})
    group.create_dataset("events", **_table(EVENT, rows))
    per_chunk = 1 if rows is None else max(1, min(rows, _ROWS_PER_CHUNK, _CHUNK_BYTES // (4 * k)))
    group.create_dataset(
        "singular_values",
        shape=(0, k),
        maxshape=(None, k),
        dtype=np.float32,
        chunks=(per_chunk, k),
        compression="gzip",
        compression_opts=1,
        shuffle=True,
        fletcher32=True,
    )
    return group


def make_steps(file: h5py.File, rows: int | None = None) -> h5py.Dataset:
    """The empty table of steps."""
    return file.create_dataset("steps", **_table(STEP, rows))


def _table(dtype: np.dtype[np.void], rows: int | None) -> dict[str, Any]:
    return {
        "shape": (0,),
        "maxshape": (None,),
        "dtype": dtype,
        "chunks": (_ROWS_PER_CHUNK,),
        "fletcher32": True,
        **({} if rows is None else {"compression": "gzip", "compression_opts": 1, "shuffle": True}),
    }


def extend(dataset: h5py.Dataset, rows: Table, kind: h5py.h5t.TypeID) -> None:
    """Add rows of an HDF5 type at the end.

    By h5py's lower layer: an event touches two data sets of every layer, and the other way takes four times as
    long. The type is told since NumPy drops an enumeration's words when it joins tables.
    """
    target = dataset.id
    shape = target.shape
    target.set_extent((shape[0] + len(rows), *shape[1:]))
    space = target.get_space()
    space.select_hyperslab((shape[0], *(0 for _ in shape[1:])), rows.shape)
    target.write(h5py.h5s.create_simple(rows.shape), space, np.ascontiguousarray(rows), mtype=kind)


def cut_after(file: h5py.File, t: int) -> None:
    """Drop rows of later steps; layers that none are left of go too."""
    for name, group in list(file["layers"].items()):
        kept = int(np.count_nonzero(group["events"]["t"] <= t))
        for dataset in group.values():
            dataset.resize(kept, axis=0)
        if kept == 0:
            del file["layers"][name]
    if "steps" in file:
        file["steps"].resize(int(np.count_nonzero(file["steps"]["step"] <= t)), axis=0)


def last_step(file: h5py.File) -> int:
    """The latest step of any row; -1 for a file without rows."""
    tables = [group["events"]["t"] for group in file["layers"].values()]
    if "steps" in file:
        tables.append(file["steps"]["step"])
    return max((int(steps.max()) for steps in tables if len(steps)), default=-1)


def takes_rows(file: h5py.File) -> bool:
    """Whether rows can be added: a file of an older version has other tables."""
    return int(file.attrs["schema_version"]) == SCHEMA_VERSION
