"""Records as tables of pandas and arrays of xarray."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from hpc_oialr.errors import DataError, MissingExtraError, UnknownNameError
from hpc_oialr.spectra.schema import EVENT, KINDS, STEP, kind_words

if TYPE_CHECKING:
    import pandas
    import xarray

    from hpc_oialr.spectra.reader import Layer, Spectra

TABLES = ("events", "steps")
# An event that a layer does not have.
NO_KIND = -1


def need(package: str, purpose: str) -> Any:
    """Import an optional package.

    Raises
    ------
    MissingExtraError
        With the line that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(package, "spectra", purpose=purpose) from error


def to_pandas(run: Spectra, table: str, *, singular_values: bool) -> pandas.DataFrame:
    """See :meth:`hpc_oialr.spectra.Spectra.to_pandas`."""
    pandas = need("pandas", "a table of spectra")
    if table not in TABLES:
        raise UnknownNameError("table", table, TABLES)
    if table == "steps":
        return pandas.DataFrame(run.steps)
    events = run.events
    frame = pandas.DataFrame({name: events[name] for name in EVENT.names or ()})
    frame["kind"] = pandas.Categorical(kind_words(events["kind"]), categories=list(KINDS))
    names = pandas.Categorical.from_codes(events["layer"], categories=list(run.layers))
    frame.insert(0, "layer", names)
    if singular_values:
        frame["singular_values"] = [
            row[~np.isnan(row)] for layer in run.values() for row in layer.singular_values
        ]
    return frame


def values_to_pandas(layer: Layer) -> pandas.DataFrame:
    """A layer's singular values, a row for each: layer, t, kind, index, value."""
    pandas = need("pandas", "a table of spectra")
    values = layer.singular_values
    rows, index = np.nonzero(~np.isnan(values))
    kinds = np.array(layer.kinds, dtype=object)
    return pandas.DataFrame(
        {
            "layer": layer.name,
            "t": layer.t[rows],
            "kind": kinds[rows],
            "index": index,
            "value": values[rows, index],
        }
    )


def runs_to_pandas(runs: Mapping[str, Spectra], table: str, *, singular_values: bool) -> pandas.DataFrame:
    """See :meth:`hpc_oialr.spectra.Runs.to_pandas`."""
    pandas = need("pandas", "a table of spectra")
    frames = []
    for name, run in runs.items():
        frame = to_pandas(run, table, singular_values=singular_values)
        if "layer" in frame:
            # Categories differ between models.
            frame["layer"] = frame["layer"].astype(str)
        frame.insert(0, "run", name)
        frames.append(frame)
    return pandas.concat(frames, ignore_index=True)


def to_xarray(run: Spectra, layers: str) -> xarray.Dataset:
    """See :meth:`hpc_oialr.spectra.Spectra.to_xarray`."""
    xarray = need("xarray", "an array of spectra")
    chosen = [layer for name, layer in run.items() if fnmatchcase(name, layers)]
    if not chosen:
        raise DataError(f"{run.path} has no layer like {layers!r}; it has {', '.join(run) or 'none'}.")
    t = np.unique(np.concatenate([layer.t for layer in chosen]))
    fields = [name for name in EVENT.names or () if name != "t"]
    data: dict[str, Any] = {name: (("layer", "t"), _spread(chosen, t, name)) for name in fields}
    data["singular_values"] = (("layer", "t", "index"), _spread_values(chosen, t))
    steps = {f"step_{n}" if n in data else n: ("step", run.steps[n]) for n in STEP.names or () if n != "step"}
    coordinates = {
        "layer": [layer.name for layer in chosen],
        "t": t,
        "m": ("layer", [layer.m for layer in chosen]),
        "n": ("layer", [layer.n for layer in chosen]),
        "step": run.steps["step"],
    }
    attributes = {"path": str(run.path), "kinds": ", ".join(f"{n} = {word}" for word, n in KINDS.items())}
    return xarray.Dataset({**data, **steps}, coords=coordinates, attrs=attributes)


def runs_to_xarray(runs: Mapping[str, Spectra], layers: str) -> xarray.Dataset:
    """See :meth:`hpc_oialr.spectra.Runs.to_xarray`."""
    xarray = need("xarray", "an array of spectra")
    sets = [to_xarray(run, layers).drop_attrs() for run in runs.values()]
    index = xarray.Variable("run", list(runs))
    joined = xarray.concat(
        sets,
        dim="run",
        join="outer",
        data_vars="all",
        coords="minimal",
        compat="override",
        combine_attrs="drop",
    )
    return joined.assign_coords(run=index)


def _spread(layers: list[Layer], t: np.ndarray[Any, Any], field: str) -> np.ndarray[Any, Any]:
    """One field over (layer, t); of two events of one step the later one."""
    missing = NO_KIND if field == "kind" else np.nan
    spread = np.full((len(layers), len(t)), missing, dtype=np.int8 if field == "kind" else np.float64)
    for row, layer in zip(spread, layers, strict=True):
        row[np.searchsorted(t, layer.t)] = layer[field]
    return spread


def _spread_values(layers: list[Layer], t: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    spread = np.full((len(layers), len(t), max(layer.k for layer in layers)), np.nan, dtype=np.float32)
    for rows, layer in zip(spread, layers, strict=True):
        rows[np.searchsorted(t, layer.t), : layer.k] = layer.singular_values
    return spread
