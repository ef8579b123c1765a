"""Reading a record of spectra: lazily, while it is written, one run or several side by side."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from hpc_oialr.errors import DataError, UnknownNameError
from hpc_oialr.spectra import tables
from hpc_oialr.spectra.pieces import Piece, open_pieces
from hpc_oialr.spectra.schema import EVENT, STEP, as_table, kind_words

if TYPE_CHECKING:
    import pandas
    import xarray

Rows = NDArray[np.void]
Path_ = str | Path


class Layer:
    """One layer's events, in the order of steps; read when they are asked for.

    Attributes
    ----------
    name
        The layer.
    m, n, k
        Shape of its weight, and the shorter side.
    index
        Its place in the model.
    """

    def __init__(self, name: str, parts: list[tuple[Piece, str]]) -> None:
        self.name, self._parts = name, parts
        attributes = parts[0][0].layer_attributes(parts[0][1])
        self.m, self.n, self.k = (int(attributes[key]) for key in ("m", "n", "k"))
        self.index = int(attributes.get("index", -1))

    def __repr__(self) -> str:
        return f"<Layer {self.name!r}: {self.m} x {self.n}, {len(self)} events>"

    def __len__(self) -> int:
        return len(self.events)

    @functools.cached_property
    def events(self) -> Rows:
        """One row per event, of dtype :data:`hpc_oialr.spectra.schema.EVENT`; shape (rows,)."""
        return self._stored_events[self._order]

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
        parts = [piece.read(f"layers/{group}/singular_values") for piece, group in self._parts]
        values: NDArray[np.float32] = np.concatenate(parts)[self._order]
        return values

    def spectrum(self, row: int) -> NDArray[np.float32]:
        """The singular values of one event, without padding; reads that row only."""
        stored, last = int(self._order[row]), 0
        for (piece, group), count in zip(self._parts, self._counts, strict=True):
            if stored < last + count:
                values: NDArray[np.float32] = piece.read(f"layers/{group}/singular_values", stored - last)
                return values[: np.count_nonzero(~np.isnan(values))]
            last += count
        raise AssertionError(row)

    @functools.cached_property
    def _tables(self) -> list[Rows]:
        return [as_table(piece.read(f"layers/{group}/events"), EVENT) for piece, group in self._parts]

    @property
    def _counts(self) -> list[int]:
        return [len(table) for table in self._tables]

    @property
    def _stored_events(self) -> Rows:
        return np.concatenate(self._tables)

    @functools.cached_property
    def _order(self) -> NDArray[np.int64]:
        """Stored rows by step, each event once: an interrupted merge leaves rows in two files."""
        stored = self._stored_events
        return _first_of_each(np.stack([stored["t"], stored["kind"].astype(np.int64)]))


class Spectra(Mapping[str, Layer]):
    """The record of one run: layers by name, in the model's order.

    A picture of the moment at which it was opened: a run that goes on does not change it. Use it in a ``with``
    statement, or call :meth:`close`.

    Parameters
    ----------
    path
        See :func:`open`.
    pieces
        Files that are open already; default those of ``path``.

    Attributes
    ----------
    path
        What was opened.
    attributes
        The root's, as they are stored; see :attr:`config` and :attr:`environment`.
    pieces
        The files.

    Examples
    --------
    ::

        with hpc_oialr.spectra.open("runs/first") as run:
            run["encoder.0"].singular_values      # (events, k), NumPy
            run.to_pandas()                       # one row per layer and event
    """

    def __init__(self, path: Path_, pieces: Sequence[Piece] = ()) -> None:
        self.path = Path(path)
        self.pieces = list(pieces) or open_pieces(self.path)
        self.attributes = self.pieces[0].attributes

    def __enter__(self) -> Spectra:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Spectra {self.path}: {len(self)} layers>"

    def __getitem__(self, name: str) -> Layer:
        if name not in self._layers:
            raise UnknownNameError("layer", name, self._layers, origin=str(self.path))
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names, in the model's order."""
        return tuple(self._layers)

    @functools.cached_property
    def events(self) -> Rows:
        """All layers' events, each row with ``layer``, its place in :attr:`layers`, before the other fields."""
        table = np.dtype([("layer", np.int64), *((name, EVENT[name]) for name in EVENT.names or ())])
        rows = np.zeros(sum(len(layer) for layer in self.values()), dtype=table)
        for name in EVENT.names or ():
            rows[name] = np.concatenate([layer[name] for layer in self.values()] or [rows[name]])
        rows["layer"] = np.repeat(np.arange(len(self)), [len(layer) for layer in self.values()])
        return rows

    @functools.cached_property
    def steps(self) -> Rows:
        """One row per step range, of dtype :data:`hpc_oialr.spectra.schema.STEP`."""
        tables_ = [as_table(piece.read("steps"), STEP) for piece in self.pieces if piece.rows("steps")]
        stored = np.concatenate(tables_) if tables_ else np.zeros(0, dtype=STEP)
        return stored[_first_of_each(stored["step"][None])]

    @property
    def config(self) -> dict[str, Any]:
        """The run's settings."""
        return self._json("config")

    @property
    def environment(self) -> dict[str, Any]:
        """What the run ran on."""
        return self._json("environment")

    def to_pandas(self, table: str = "events", *, singular_values: bool = False) -> pandas.DataFrame:
        """A table with a row per layer and event, or with "steps" per step range.

        Parameters
        ----------
        singular_values
            Add a column with the array of each event's values, without padding.

        Raises
        ------
        MissingExtraError
            Without pandas.
        """
        return tables.to_pandas(self, table, singular_values=singular_values)

    def to_xarray(self, layers: str = "*") -> xarray.Dataset:
        """Fields of events over (layer, t), singular values over (layer, t, index), steps over (step).

        Where a layer has no event of a step, and beyond its k, there is NaN.

        Parameters
        ----------
        layers
            Shell pattern of names.

        Raises
        ------
        MissingExtraError
            Without xarray.
        """
        return tables.to_xarray(self, layers)

    def close(self) -> None:
        """Let go of all files."""
        for piece in self.pieces:
            piece.close()

    @functools.cached_property
    def _layers(self) -> dict[str, Layer]:
        parts: dict[str, list[tuple[Piece, str]]] = {}
        for piece in self.pieces:
            for group in piece.layers:
                parts.setdefault("" if group == "%" else unquote(group), []).append((piece, group))
        layers = [Layer(name, found) for name, found in parts.items()]
        if all(layer.index >= 0 for layer in layers):
            layers.sort(key=lambda layer: layer.index)
        return {layer.name: layer for layer in layers}

    def _json(self, name: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.attributes.get(name, "{}"))
        return value


class Runs(Mapping[str, Spectra]):
    """Several runs side by side, by their folders' names, or by whole paths where names are equal."""

    def __init__(self, paths: Iterable[Path_]) -> None:
        given = [Path(path) for path in paths]
        if not given:
            raise DataError("no run was given; name at least one folder or spectra.h5.")
        self._runs = dict(zip(_labels(given), (Spectra(path) for path in given), strict=True))

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, name: str) -> Spectra:
        if name not in self._runs:
            raise UnknownNameError("run", name, self._runs)
        return self._runs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._runs)

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all layers that any run has."""
        return tuple(dict.fromkeys(name for run in self.values() for name in run))

    def to_pandas(self, table: str = "events", *, singular_values: bool = False) -> pandas.DataFrame:
        """As :meth:`Spectra.to_pandas`, with a first column ``run``."""
        return tables.runs_to_pandas(self, table, singular_values=singular_values)

    def to_xarray(self, layers: str = "*") -> xarray.Dataset:
        """As :meth:`Spectra.to_xarray`, with a first dimension ``run``."""
        return tables.runs_to_xarray(self, layers)

    def close(self) -> None:
        """Let go of all files."""
        for run in self.values():
            run.close()


@overload
def open(path: Path_) -> Spectra: ...


@overload
def open(path: list[Any] | tuple[Any, ...]) -> Runs: ...


def open(path: Path_ | list[Any] | tuple[Any, ...]) -> Spectra | Runs:
    """Open the record of a run, or of several; also while they are written.

    Parameters
    ----------
    path
        A run's folder, its ``spectra.h5``, or one segment of it; a list of them for :class:`Runs`.

    Raises
    ------
    DataError
        If there is none, it is damaged, or of a newer schema.
    """
    return Spectra(path) if isinstance(path, str | Path) else Runs(path)


def _labels(paths: list[Path]) -> list[str]:
    folders = [path.parent if path.suffix == ".h5" else path for path in paths]
    names = [folder.resolve().name for folder in folders]
    return [str(path) if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]


def _first_of_each(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of the columns in order, the first one of equals only; ``keys`` of shape (keys, rows)."""
    order = np.lexsort(keys[::-1])
    ordered = keys[:, order]
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = (ordered[:, 1:] != ordered[:, :-1]).any(axis=0)
    return order[fresh]
