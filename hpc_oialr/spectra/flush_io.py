"""One flush of a record as a file of NumPy: small, quickly written and read, whole in memory.

A zip of ``header`` (JSON: attributes of the root; name, index, m, n and count of rows of each layer), ``events`` and
``singular_values`` (layer after layer), and ``steps``. The zip's checksums tell damage.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hpc_oialr.record.files import to_json, write_atomically
from hpc_oialr.spectra.rows import Rows
from hpc_oialr.spectra.schema import EVENT, group_name, root_attributes

# NumPy's files cannot hold the words of an enumeration.
_EVENT = np.dtype([(name, EVENT[name].str) for name in EVENT.names or ()])


def write_flush(path: Path, attributes: Mapping[str, Any], rows: Rows) -> None:
    """Write a file, which takes its place in one rename.

    Raises
    ------
    OSError
        If it cannot be written; what was there is as before.
    """
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


class Group(dict[str, Any]):
    """Tables and groups by name, with attributes, as h5py has them."""

    def __init__(self, attributes: Mapping[str, Any], content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.attrs = attributes

    def close(self) -> None:
        """Nothing is open."""


def read_flush(path: Path) -> Group:
    """What :func:`write_flush` wrote, as it would be in HDF5."""
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
        layers[group_name(name)] = Group({"name": name, "index": index, "m": m, "n": n, "k": k}, tables)
        row, value = row + count, value + count * k
    return Group(header["attributes"], {"layers": Group({}, layers), "steps": steps})
