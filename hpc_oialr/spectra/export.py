"""A record as files that other programs read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from hpc_oialr.errors import UnknownNameError
from hpc_oialr.spectra import tables
from hpc_oialr.spectra.reader import Spectra

Format = Literal["csv", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)


def export(path: Path | str, form: str, out: Path | None = None) -> list[Path]:
    """Write a record's tables; the files that were written.

    ``events``: a row per layer and event; ``steps``: a row per step range; singular values as a column of lists
    in Parquet, and in CSV as a third table with a row per layer, event and value.

    Parameters
    ----------
    path
        A run's folder or its ``spectra.h5``.
    form
        "csv" or "parquet".
    out
        Folder to write; default ``spectra_FORMAT`` beside the record.

    Raises
    ------
    UnknownNameError
        For another format.
    DataError
        If the record is damaged.
    MissingExtraError
        Without pandas, or for Parquet without pyarrow.
    """
    if form not in FORMATS:
        raise UnknownNameError("format", form, FORMATS)
    path = Path(path)
    folder = out or (path if path.is_dir() else path.parent) / f"spectra_{form}"
    with Spectra(path) as run:
        folder.mkdir(parents=True, exist_ok=True)
        return _parquet(run, folder) if form == "parquet" else _csv(run, folder)


def _parquet(run: Spectra, folder: Path) -> list[Path]:
    tables.need("pyarrow", "a Parquet file")
    events, steps = folder / "events.parquet", folder / "steps.parquet"
    _whole(events, lambda draft: run.to_pandas(singular_values=True).to_parquet(draft, index=False))
    _whole(steps, lambda draft: run.to_pandas("steps").to_parquet(draft, index=False))
    return [events, steps]


def _csv(run: Spectra, folder: Path) -> list[Path]:
    names = ("events", "steps", "singular_values")
    events, steps, values = (folder / f"{name}.csv" for name in names)
    _whole(events, lambda draft: run.to_pandas().to_csv(draft, index=False))
    _whole(steps, lambda draft: run.to_pandas("steps").to_csv(draft, index=False))
    _whole(values, lambda draft: _values_csv(run, draft))
    return [events, steps, values]


def _values_csv(run: Spectra, draft: Path) -> None:
    """Layer by layer: all values of a long run at once are many gigabytes of text."""
    with draft.open("w", encoding="utf-8", newline="") as file:
        for place, layer in enumerate(run.values()):
            tables.values_to_pandas(layer).to_csv(file, index=False, header=place == 0)


def _whole(path: Path, write: Callable[[Path], None]) -> None:
    draft = path.with_name(f".{path.name}.tmp")
    write(draft)
    draft.replace(path)
