"""Records as tables of pandas and arrays of xarray."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from hpc_oialr.errors import DataError, MissingExtraError
from hpc_oialr.spectra.layer import Layer
from hpc_oialr.spectra.schema import EVENT, KINDS, STEP, kind_words

if TYPE_CHECKING:
    import pandas
    import xarray

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


def events_to_pandas(layers: Mapping[str, Layer], *, singular_values: bool) -> pandas.DataFrame:
    """A row per layer and event; see :meth:`hpc_oialr.spectra.Spectra.to_pandas`."""
    pandas = need("pandas", "a table of spectra")
    events = np.concatenate([np.zeros(0, dtype=EVENT), *(layer.events for layer in layers.values())])
    frame = pandas.DataFrame({name: events[name] for name in EVENT.names or ()})
    frame["kind"] = pandas.Categorical(kind_words(events["kind"]), categories=list(KINDS))
    places = np.repeat(np.arange(len(layers)), [len(layer) for layer in layers.values()])
    frame.insert(0, "layer", pandas.Categorical.from_codes(places, categories=list(layers)))
    if singular_values:
        frame["singular_values"] = [
            row[~np.isnan(row)] for layer in layers.values() for row in layer.singular_values
        ]
    return frame


def steps_to_pandas(steps: np.ndarray[Any, Any]) -> pandas.DataFrame:
    """A row per step range."""
    return need("pandas", "a table of spectra").DataFrame(steps)


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


def runs_to_pandas(frames: Mapping[str, pandas.DataFrame]) -> pandas.DataFrame:
    """Tables of several runs in one, with a first column ``run``."""
    pandas = need("pandas", "a table of spectra")
    for name, frame in frames.items():
        if "layer" in frame:
            # Categories differ between models.
            frame["layer"] = frame["layer"].astype(str)
        frame.insert(0, "run", name)
    return pandas.concat(frames.values(), ignore_index=True)


def to_xarray(
    layers: Mapping[str, Layer], steps: np.ndarray[Any, Any], path: str, pattern: str
) -> xarray.Dataset:
    """See :meth:`hpc_oialr.spectra.Spectra.to_xarray`."""
    xarray = need("xarray", "an array of spectra")
    chosen = [layer for name, layer in layers.items() if fnmatchcase(name, pattern)]
    if not chosen:
        raise DataError(f"{path} has no layer like {pattern!r}; it has {', '.join(layers) or 'none'}.")
    t = np.unique(np.concatenate([layer.t for layer in chosen]))
    fields = [name for name in EVENT.names or () if name != "t"]
    data: dict[str, Any] = {name: (("layer", "t"), _spread(chosen, t, name)) for name in fields}
    data["singular_values"] = (("layer", "t", "index"), _spread_values(chosen, t))
    of_steps = {f"step_{n}" if n in data else n: ("step", steps[n]) for n in STEP.names or () if n != "step"}
    coordinates = {
        "layer": [layer.name for layer in chosen],
        "t": t,
        "m": ("layer", [layer.m for layer in chosen]),
        "n": ("layer", [layer.n for layer in chosen]),
        "step": steps["step"],
    }
    attributes = {"path": path, "kinds": ", ".join(f"{n} = {word}" for word, n in KINDS.items())}
    return xarray.Dataset({**data, **of_steps}, coords=coordinates, attrs=attributes)


def runs_to_xarray(sets: Mapping[str, xarray.Dataset]) -> xarray.Dataset:
    """Arrays of several runs in one, with a first dimension ``run``."""
    xarray = need("xarray", "an array of spectra")
    joined = xarray.concat(
        [each.drop_attrs() for each in sets.values()],
        dim="run",
        join="outer",
        data_vars="all",
        coords="minimal",
        compat="override",
        combine_attrs="drop",
    )
    return joined.assign_coords(run=xarray.Variable("run", list(sets)))


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
