"""Reading a record of spectra: lazily, while it is written, one run or several side by side."""

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
from hpc_oialr.spectra.files import gaps_in, head_of, record_files, side_files, side_path
from hpc_oialr.spectra.layer import Layer, first_of_each
from hpc_oialr.spectra.record_file import RecordFile
from hpc_oialr.spectra.schema import EVENT, NO_STEPS

if TYPE_CHECKING:
    import pandas
    import xarray

Path_ = str | Path
# A file that was listed may be gone when it is opened, since a run joins files.
_TRIES, _PAUSE_S = 10, 0.05
TABLES = ("events", "steps")


def open_files(path: Path, side: Path | None = None) -> list[RecordFile]:
    """All files of a record, as they are at one moment, oldest rows first.

    Parameters
    ----------
    path
        A run's folder, its ``spectra.h5``, or one segment alone.
    side
        Its continuation; default the folders in which it may be.

    Raises
    ------
    DataError
        If there is nothing, or a file is damaged or missing.
    """
    head = head_of(path)
    if path != head and not path.is_dir():
        return [RecordFile(path)]
    for _ in range(_TRIES):
        files: list[RecordFile] = []
        try:
            files += [RecordFile(each) for each in record_files(head)]
            files += [RecordFile(each) for there in _sides(head, files, side) for each in side_files(there)]
            # The head of an earlier version counts its segments.
            counted = int(files[0].attributes.get("segments", 0)) if files else 0
            missing = gaps_in([file.path for file in files], counted)
            # After a join a number may be that of newer rows.
            missing += [file.path for file in files if file.replaced]
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


def _sides(head: Path, files: Sequence[RecordFile], side: Path | None) -> list[Path]:
    """Possible continuations: in the default folder, and in ``record.side_folder`` of its settings."""
    if side is not None:
        return [side]
    config = json.loads(files[-1].attributes.get("config", "{}")) if files else {}
    named = (config.get("record") or {}).get("side_folder")
    return list(dict.fromkeys(side_path(head, folder) for folder in (None, named)))


class Spectra(Mapping[str, Layer]):
    """The record of one run: layers by name, in the model's order.

    A snapshot of the moment at which it was opened, also while the run continues. Use it in a ``with`` statement, or
    call :meth:`close`.

    Parameters
    ----------
    path
        See :func:`open`.
    files
        Files that are open already; default those of ``path``.

    Attributes
    ----------
    path
        What was opened.
    attributes
        The root's, as they are stored; see :attr:`config` and :attr:`environment`.
    files
        The files.

    Examples
    --------
    ::

        with hpc_oialr.spectra.open("runs/first") as run:
            run["encoder.0"].singular_values      # (events, k), NumPy
            run.to_pandas()                       # one row per layer and event
    """

    def __init__(self, path: Path_, files: Sequence[RecordFile] = ()) -> None:
        self.path = Path(path)
        self.files = list(files) or open_files(self.path)
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
        table = np.dtype([("layer", np.int64), *((name, EVENT[name]) for name in EVENT.names or ())])
        rows = np.zeros(sum(len(layer) for layer in self.values()), dtype=table)
        for name in EVENT.names or ():
            rows[name] = np.concatenate([layer[name] for layer in self.values()] or [rows[name]])
        rows["layer"] = np.repeat(np.arange(len(self)), [len(layer) for layer in self.values()])
        return rows

    @functools.cached_property
    def steps(self) -> NDArray[np.void]:
        """One row per step range, of dtype :data:`hpc_oialr.spectra.schema.STEP`."""
        stored = np.concatenate([NO_STEPS, *(file.steps for file in self.files)])
        return stored[first_of_each(stored["step"][None])]

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
        if table not in TABLES:
            raise UnknownNameError("table", table, TABLES)
        if table == "steps":
            return tables.steps_to_pandas(self.steps)
        return tables.events_to_pandas(self, singular_values=singular_values)

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
        return tables.to_xarray(self, self.steps, str(self.path), layers)

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
        layers = [Layer(name, files) for name, files in found.items()]
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
        return tables.runs_to_pandas(
            {name: run.to_pandas(table, singular_values=singular_values) for name, run in self.items()}
        )

    def to_xarray(self, layers: str = "*") -> xarray.Dataset:
        """As :meth:`Spectra.to_xarray`, with a first dimension ``run``."""
        return tables.runs_to_xarray({name: run.to_xarray(layers) for name, run in self.items()})

    def close(self) -> None:
        """Close all files."""
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
