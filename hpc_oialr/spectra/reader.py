"""Read a record of spectra: lazily, also while it is written, one run or several side by side."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from hpc_oialr.errors import DataError, UnknownNameError
from hpc_oialr.spectra import tables
from hpc_oialr.spectra.files import RecordFile, gaps_in, head_of, record_files
from hpc_oialr.spectra.schema import EVENT, NO_STEPS, kind_words

if TYPE_CHECKING:
    import pandas
    import xarray

Path_ = str | Path
_TRIES, _PAUSE_S = 10, 0.05  # a listed file may be gone when it is opened, since a run joins files
TABLES = ("events", "steps")


class Layer:
    """Events of the layer ``name`` in the order of steps, read on demand.

    ``m``, ``n`` and ``k`` are the shape of its weight and the shorter side, ``index`` its position in the model.
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
        """Stored rows by step, each event once: a killed join leaves rows twice."""
        stored = np.concatenate(self._tables)
        return _first_of_each(np.stack([stored["t"], stored["kind"].astype(np.int64)]))


def _first_of_each(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of the columns in sorted order, the first of equal ones only; ``keys`` of shape (keys, rows)."""
    order = np.lexsort(keys[::-1])
    ordered = keys[:, order]
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = (ordered[:, 1:] != ordered[:, :-1]).any(axis=0)
    return order[fresh]


class Spectra(Mapping[str, Layer]):
    """The record of one run: layers by name, in the model's order. Use it in a ``with`` statement, or call :meth:`close`.

    A snapshot of ``path`` when it was opened; ``attributes`` are the root's as they are stored, see :attr:`config`.

    Examples
    --------
    ::

        with hpc_oialr.spectra.open("runs/first") as run:
            run["encoder.0"].singular_values      # (events, k), NumPy
            run.to_pandas()                       # one row per layer and event
    """

    def __init__(self, path: Path_, files: Sequence[RecordFile] = ()) -> None:
        self.path = Path(path)
        self.files = list(files) or _open_files(self.path)
        self.attributes = self.files[0].attributes

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
    def events(self) -> NDArray[np.void]:
        """All layers' events, each row with ``layer``, its place in :attr:`layers`, before the other fields."""
        lengths, names = [len(layer) for layer in self.values()], EVENT.names or ()
        table = np.dtype([("layer", np.int64), *((name, EVENT[name]) for name in names)])
        rows = np.zeros(sum(lengths), dtype=table)
        for name in names:
            rows[name] = np.concatenate([layer[name] for layer in self.values()] or [rows[name]])
        rows["layer"] = np.repeat(np.arange(len(self)), lengths)
        return rows

    @functools.cached_property
    def steps(self) -> NDArray[np.void]:
        """One row per step range, of dtype :data:`hpc_oialr.spectra.schema.STEP`."""
        stored = np.concatenate([NO_STEPS, *(file.steps for file in self.files)])
        return stored[_first_of_each(stored["step"][None])]

    @property
    def config(self) -> dict[str, Any]:
        """The run's settings."""
        return dict(json.loads(self.attributes.get("config", "{}")))

    @property
    def environment(self) -> dict[str, Any]:
        """What the run ran on."""
        return dict(json.loads(self.attributes.get("environment", "{}")))

    def to_pandas(self, table: str = "events", *, singular_values: bool = False) -> pandas.DataFrame:
        """A row per layer and event, or with "steps" per step range; ``singular_values``: add each event's array."""
        if table not in TABLES:
            raise UnknownNameError("table", table, TABLES)
        if table == "steps":
            return tables.need("pandas").DataFrame(self.steps)
        return tables.events_to_pandas(self, singular_values=singular_values)

    def to_xarray(self, layers: str = "*") -> xarray.Dataset:
        """Fields of events over (layer, t), singular values over (layer, t, index), steps over (step).

        Where a layer has no event of a step, and beyond its k, there is NaN. ``layers``: shell pattern of names.
        """
        return tables.to_xarray(self, layers)

    def close(self) -> None:
        """Close all files."""
        for file in self.files:
            file.close()

    @functools.cached_property
    def _layers(self) -> dict[str, Layer]:
        found: dict[str, list[RecordFile]] = {}
        for file in self.files:
            for name in file.layers:
                found.setdefault(name, []).append(file)
        layers = (Layer(name, files) for name, files in found.items())
        return {layer.name: layer for layer in sorted(layers, key=lambda layer: layer.index)}


def _open_files(path: Path) -> list[RecordFile]:
    """All files of a record at one moment, oldest rows first; or one segment alone."""
    head = head_of(path)
    if path != head and not path.is_dir():
        return [RecordFile(path)]
    for _ in range(_TRIES):
        files: list[RecordFile] = []
        try:
            files += [RecordFile(each) for each in record_files(head)]
            # After a join a number may be that of newer rows.
            missing = [
                *gaps_in([file.path for file in files]),
                *(file.path for file in files if file.replaced),
            ]
        except DataError:
            raise
        except FileNotFoundError as error:
            missing = [Path(error.filename or head)]
        if not missing:
            break
        for file in files:
            file.close()
        time.sleep(_PAUSE_S)
    else:
        raise DataError(
            f"{missing[0]} does not exist, or changes; it is a part of {head}. Save what can be read with: "
            f"oialr spectra repair {head}"
        )
    if not files:
        raise DataError(f"{head} does not exist; must be the spectra.h5 of a run.")
    return files


class Runs(dict[str, Spectra]):
    """Several runs side by side, by their folders' names, or by whole paths where names are equal."""

    def __init__(self, paths: Iterable[Path_]) -> None:
        given = [Path(path) for path in paths]
        if not given:
            raise DataError("no run was given; name at least one folder or spectra.h5.")
        folders = [path.parent if path.suffix == ".h5" else path for path in given]
        names = [folder.resolve().name for folder in folders]
        for path, name in zip(given, names, strict=True):
            self[str(path) if names.count(name) > 1 else name] = Spectra(path)

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __missing__(self, name: str) -> Spectra:
        raise UnknownNameError("run", name, self)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all layers that any run has."""
        return tuple(dict.fromkeys(name for run in self.values() for name in run))

    def to_pandas(self, table: str = "events", *, singular_values: bool = False) -> pandas.DataFrame:
        """As :meth:`Spectra.to_pandas`, with a first column ``run``."""
        frames = [run.to_pandas(table, singular_values=singular_values) for run in self.values()]
        for name, frame in zip(self, frames, strict=True):
            if "layer" in frame:
                # Categories differ between models.
                frame["layer"] = frame["layer"].astype(str)
            frame.insert(0, "run", name)
        return tables.need("pandas").concat(frames, ignore_index=True)

    def to_xarray(self, layers: str = "*") -> xarray.Dataset:
        """As :meth:`Spectra.to_xarray`, with a first dimension ``run``."""
        xarray, sets = tables.need("xarray"), [run.to_xarray(layers).drop_attrs() for run in self.values()]
        options = {"join": "outer", "data_vars": "all", "coords": "minimal", "compat": "override"}
        joined = xarray.concat(sets, dim="run", combine_attrs="drop", **options)
        return joined.assign_coords(run=xarray.Variable("run", list(self)))

    def close(self) -> None:
        """Close all files."""
        for run in self.values():
            run.close()


@overload
def open(path: Path_) -> Spectra: ...


@overload
def open(path: list[Any] | tuple[Any, ...]) -> Runs: ...


def open(path: Path_ | list[Any] | tuple[Any, ...]) -> Spectra | Runs:
    """Open the record of a run or of several, also while they are written.

    ``path``: a run's folder, its ``spectra.h5``, or one segment of it; a list of them for :class:`Runs`. DataError if
    there is none, it is damaged, or of another schema.
    """
    return Spectra(path) if isinstance(path, str | Path) else Runs(path)
