"""Records as tables of pandas, arrays of xarray, CSV and Parquet."""

from __future__ import annotations

import importlib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpc_oialr.errors import DataError, MissingExtraError, UnknownNameError
from hpc_oialr.outputs import new_folder
from hpc_oialr.spectra.schema import EVENT, KINDS, STEP

if TYPE_CHECKING:
    import pandas
    import xarray

    from hpc_oialr.spectra.reader import Spectra

NO_KIND = -1  # an event that a layer does not have
FORMATS = ("csv", "parquet")


def need(package: str) -> Any:
    """Import an optional package, or raise MissingExtraError with the line that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(package, "spectra", purpose="a table of spectra") from error


def events_to_pandas(run: Spectra, *, singular_values: bool) -> pandas.DataFrame:
    """A row per layer and event; see :meth:`hpc_oialr.spectra.Spectra.to_pandas`."""
    pandas = need("pandas")
    frame = pandas.DataFrame(run.events)
    for name, words in (("layer", run.layers), ("kind", tuple(KINDS))):
        frame[name] = pandas.Categorical.from_codes(frame[name], categories=words)
    if singular_values:
        rows = (row for layer in run.values() for row in layer.singular_values)
        frame["singular_values"] = [row[~np.isnan(row)] for row in rows]
    return frame


def to_xarray(run: Spectra, pattern: str) -> xarray.Dataset:
    """See :meth:`hpc_oialr.spectra.Spectra.to_xarray`; of two events of one step the later one counts."""
    xarray = need("xarray")
    chosen = [layer for name, layer in run.items() if fnmatchcase(name, pattern)]
    if not chosen:
        raise DataError(f"{run.path} has no layer like {pattern!r}; it has {', '.join(run) or 'none'}.")
    t = np.unique(np.concatenate([layer.t for layer in chosen]))
    shape = (len(chosen), len(t))
    data: dict[str, Any] = {}
    for field in (name for name in EVENT.names or () if name != "t"):
        of_kind = field == "kind"
        spread = np.full(shape, NO_KIND if of_kind else np.nan, dtype=np.int8 if of_kind else np.float64)
        for row, layer in zip(spread, chosen, strict=True):
            row[np.searchsorted(t, layer.t)] = layer[field]
        data[field] = (("layer", "t"), spread)
    values = np.full((*shape, max(layer.k for layer in chosen)), np.nan, dtype=np.float32)
    for rows, layer in zip(values, chosen, strict=True):
        rows[np.searchsorted(t, layer.t), : layer.k] = layer.singular_values
    data["singular_values"] = (("layer", "t", "index"), values)
    names = (name for name in STEP.names or () if name != "step")
    of_steps = {f"step_{name}" if name in data else name: ("step", run.steps[name]) for name in names}
    coordinates = {
        "layer": [layer.name for layer in chosen],
        "t": t,
        "m": ("layer", [layer.m for layer in chosen]),
        "n": ("layer", [layer.n for layer in chosen]),
        "step": run.steps["step"],
    }
    attributes = {"path": str(run.path), "kinds": ", ".join(f"{n} = {word}" for word, n in KINDS.items())}
    return xarray.Dataset({**data, **of_steps}, coords=coordinates, attrs=attributes)


def export(run: Spectra, form: str, out: Path | None = None, *, force: bool = False) -> list[Path]:
    """Write a record's tables ``events`` and ``steps`` and return the files.

    Singular values are a column of lists in Parquet, and a third table with a row per value in CSV. ``form`` is "csv" or
    "parquet"; ``out`` a folder, by default ``spectra_FORMAT`` beside the record. ``force``: write into a folder with
    other content too; see :func:`hpc_oialr.outputs.new_folder`.
    """
    if form not in FORMATS:
        raise UnknownNameError("format", form, FORMATS)
    source = run.path if run.path.is_dir() else run.path.parent
    folder = out or source / f"spectra_{form}"
    with new_folder(folder, "oialr spectra export", inputs=[source], force=force) as draft:
        if form == "parquet":
            need("pyarrow")
            run.to_pandas(singular_values=True).to_parquet(draft / "events.parquet", index=False)
            run.to_pandas("steps").to_parquet(draft / "steps.parquet", index=False)
            return [folder / "events.parquet", folder / "steps.parquet"]
        run.to_pandas().to_csv(draft / "events.csv", index=False)
        run.to_pandas("steps").to_csv(draft / "steps.csv", index=False)
        # Layer by layer: all values of a long run at once are many gigabytes of text.
        with (draft / "singular_values.csv").open("w", encoding="utf-8", newline="") as file:
            for place, layer in enumerate(run.values()):
                values = layer.singular_values
                rows, index = np.nonzero(~np.isnan(values))
                columns = {
                    "layer": layer.name,
                    "t": layer.t[rows],
                    "kind": np.array(layer.kinds, dtype=object)[rows],
                    "index": index,
                    "value": values[rows, index],
                }
                need("pandas").DataFrame(columns).to_csv(file, index=False, header=place == 0)
    return [folder / name for name in ("events.csv", "steps.csv", "singular_values.csv")]
