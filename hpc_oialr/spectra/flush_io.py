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
from numpy.typing import NDArray

from hpc_oialr.errors import DataError
from hpc_oialr.record.files import to_json, write_atomically
from hpc_oialr.spectra.hdf5_io import DAMAGE, check_version, damaged, plain_attributes
from hpc_oialr.spectra.rows import LayerRows, Rows
from hpc_oialr.spectra.schema import EVENT, SCHEMA_VERSION, STEP, as_table

# NumPy's files cannot hold the words of an enumeration.
_EVENT = np.dtype([(name, EVENT[name].str) for name in EVENT.names or ()])


def write_flush(path: Path, attributes: Mapping[str, Any], rows: Rows) -> None:
    """Write a file, which takes its place in one rename.

    Raises
    ------
    OSError
        If it cannot be written; what was there is as before.
    """
    header = {
        "attributes": {"schema_version": SCHEMA_VERSION, **plain_attributes(attributes)},
        "layers": [[each.name, each.index, each.m, each.n, len(each.events)] for each in rows.layers],
    }
    events = [each.events.astype(_EVENT) for each in rows.layers]
    values = [each.singular_values.ravel() for each in rows.layers]
    content = io.BytesIO()
    np.savez(
        content,
        header=np.frombuffer(to_json(header).encode(), dtype=np.uint8),
        events=np.concatenate([np.zeros(0, dtype=_EVENT), *events]),
        singular_values=np.concatenate([np.zeros(0, dtype=np.float32), *values]),
        steps=rows.steps,
    )
    write_atomically(path, content.getvalue())


class FlushFile:
    """As :class:`~hpc_oialr.spectra.hdf5_io.RecordFile`, of a file that :func:`write_flush` wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = path.read_bytes()
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                if bad := archive.testzip():
                    raise ValueError(f"checksum of {bad}")
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                header = json.loads(arrays["header"].tobytes())
                self.attributes: dict[str, Any] = header["attributes"]
                check_version(path, self.attributes["schema_version"])
                self.steps = as_table(arrays["steps"], STEP)
                made = _layers(header["layers"], as_table(arrays["events"], EVENT), arrays["singular_values"])
        except DataError:
            raise
        except DAMAGE as error:
            raise damaged(path, error) from error
        self._rows = {each.name: each for each in made}
        self.layers = tuple(self._rows)

    def shape(self, layer: str) -> tuple[int, int, int]:
        """A layer's place in the model, and its weight's m and n."""
        rows = self._rows[layer]
        return rows.index, rows.m, rows.n

    def events(self, layer: str) -> NDArray[np.void]:
        """A layer's events, of dtype EVENT."""
        return self._rows[layer].events

    def singular_values(self, layer: str, rows: Any = ()) -> NDArray[np.float32]:
        """A layer's singular values, or some rows of them."""
        return np.asarray(self._rows[layer].singular_values[rows])

    def close(self) -> None:
        """Nothing is open."""


def _layers(header: list[Any], events: NDArray[np.void], values: NDArray[np.float32]) -> list[LayerRows]:
    made, row, value = [], 0, 0
    for name, index, m, n, count in header:
        k = min(m, n)
        own = values[value : value + count * k].reshape(count, k)
        made.append(LayerRows(name, index, m, n, events[row : row + count], own))
        row, value = row + count, value + count * k
    return made
