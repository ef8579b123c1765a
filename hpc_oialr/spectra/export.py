"""A record as files that other programs read."""

from __future__ import annotations

from pathlib import Path

from hpc_oialr.errors import UnknownNameError
from hpc_oialr.outputs import new_folder
from hpc_oialr.spectra import tables
from hpc_oialr.spectra.reader import Spectra

FORMATS = ("csv", "parquet")


def export(path: Path | str, form: str, out: Path | None = None, *, force: bool = False) -> list[Path]:
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
    force
        Write into a folder with other content too; see :func:`hpc_oialr.outputs.new_folder`.

    Raises
    ------
    UnknownNameError
        For another format.
    DataError
        If the record is damaged.
    OutputError
        If the folder holds what no export wrote.
    MissingExtraError
        Without pandas, or for Parquet without pyarrow.
    """
    if form not in FORMATS:
        raise UnknownNameError("format", form, FORMATS)
    path = Path(path)
    source = path if path.is_dir() else path.parent
    folder = out or source / f"spectra_{form}"
    with (
        Spectra(path) as run,
        new_folder(folder, "oialr spectra export", inputs=[source], force=force) as draft,
    ):
        names = _parquet(run, draft) if form == "parquet" else _csv(run, draft)
    return [folder / name for name in names]


def _parquet(run: Spectra, folder: Path) -> list[str]:
    tables.need("pyarrow", "a Parquet file")
    run.to_pandas(singular_values=True).to_parquet(folder / "events.parquet", index=False)
    run.to_pandas("steps").to_parquet(folder / "steps.parquet", index=False)
    return ["events.parquet", "steps.parquet"]


def _csv(run: Spectra, folder: Path) -> list[str]:
    run.to_pandas().to_csv(folder / "events.csv", index=False)
    run.to_pandas("steps").to_csv(folder / "steps.csv", index=False)
    # Layer by layer: all values of a long run at once are many gigabytes of text.
    with (folder / "singular_values.csv").open("w", encoding="utf-8", newline="") as file:
        for place, layer in enumerate(run.values()):
            tables.values_to_pandas(layer).to_csv(file, index=False, header=place == 0)
    return ["events.csv", "steps.csv", "singular_values.csv"]
