"""One layer of an open record."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_oialr.errors import UnknownNameError
from hpc_oialr.spectra.record_file import RecordFile
from hpc_oialr.spectra.schema import EVENT, kind_words


class Layer:
    """One layer's events, in the order of steps; read when they are asked for.

    Attributes
    ----------
    name
        The layer.
    m, n, k
        Shape of its weight, and the shorter side.
    index
        Its position in the model; -1 in files of version 1.
    """

    def __init__(self, name: str, files: list[RecordFile]) -> None:
        self.name, self._files = name, files
        self.index, self.m, self.n = files[0].shape(name)
        self.k = min(self.m, self.n)

    def __repr__(self) -> str:
        return f"<Layer {self.name!r}: {self.m} x {self.n}, {len(self)} events>"

    def __len__(self) -> int:
        return len(self.events)

    @functools.cached_property
    def events(self) -> NDArray[np.void]:
        """One row per event, of dtype :data:`hpc_oialr.spectra.schema.EVENT`; shape (rows,)."""
        return np.concatenate(self._tables)[self._order]

    def __getitem__(self, field: str) -> NDArray[Any]:
        """A field of ``events``, e.g. ``layer["stable_rank"]``; shape (rows,)."""
        if field not in (EVENT.names or ()):
            raise UnknownNameError("field of events", field, EVENT.names or ())
        values: NDArray[Any] = self.events[field]
        return values

    @property
    def t(self) -> NDArray[np.int64]:
        """Step of each event; shape (rows,)."""
        return self["t"]

    @property
    def kinds(self) -> list[str]:
        """Each event in words: stability, conversion, update."""
        return kind_words(self["kind"])

    @property
    def r(self) -> NDArray[np.int64]:
        """Inner dimension after each event; shape (rows,)."""
        return self["r"]

    @property
    def stability(self) -> NDArray[np.float64]:
        """Agreement with the basis before; shape (rows,)."""
        return self["stability"]

    @property
    def singular_values(self) -> NDArray[np.float32]:
        """Before each event's cut, descending, padded with NaN; shape (rows, k). Read anew at each call."""
        return np.concatenate([file.singular_values(self.name) for file in self._files])[self._order]

    def spectrum(self, row: int) -> NDArray[np.float32]:
        """The singular values of one event, without padding; reads that row only."""
        starts = np.cumsum([0, *map(len, self._tables)])
        stored = int(self._order[row])
        place = int(np.searchsorted(starts, stored, side="right")) - 1
        values = self._files[place].singular_values(self.name, stored - int(starts[place]))
        return values[: np.count_nonzero(~np.isnan(values))]

    @functools.cached_property
    def _tables(self) -> list[NDArray[np.void]]:
        return [file.events(self.name) for file in self._files]

    @functools.cached_property
    def _order(self) -> NDArray[np.int64]:
        """Stored rows by step, each event once: a killed join leaves rows in two files."""
        stored = np.concatenate(self._tables)
        return first_of_each(np.stack([stored["t"], stored["kind"].astype(np.int64)]))


def first_of_each(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of the columns in order, the first one of equals only; ``keys`` of shape (keys, rows)."""
    order = np.lexsort(keys[::-1])
    ordered = keys[:, order]
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = (ordered[:, 1:] != ordered[:, :-1]).any(axis=0)
    return order[fresh]
