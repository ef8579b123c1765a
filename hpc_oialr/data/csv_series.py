"""Read a CSV of time series: value columns, and maybe a column of names and one of times."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from hpc_oialr.errors import DataError


@dataclass
class SeriesTable:
    """Rows of one series, in order of time.

    Attributes
    ----------
    values
        One list per value column; NaN where nothing was observed.
    times
        Wall-clock times as written, without zone; empty without a time column.
    """

    values: list[list[float]]
    times: list[datetime] = field(default_factory=list)


def read_series(
    path: Path, columns: Sequence[str], *, id_column: str | None, timestamp_column: str | None
) -> dict[str, SeriesTable]:
    """Read a CSV with a header.

    Parameters
    ----------
    path
        The file.
    columns
        Names of the value columns.
    id_column
        Column that tells series apart; None: the file is one series, named "".
    timestamp_column
        Column of ISO 8601 times, ascending within a series.

    Raises
    ------
    DataError
        Names the file, the line, the column, and what is wrong there.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Set data.path to a CSV file.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: {error}.") from error
    rows = csv.DictReader(io.StringIO(text, newline=""))
    header = rows.fieldnames or ()
    missing = [name for name in (*columns, id_column, timestamp_column) if name and name not in header]
    if missing:
        raise DataError(f"{path} has no column {', '.join(missing)}; it has: {', '.join(header) or 'none'}.")
    tables: dict[str, SeriesTable] = {}
    for row in rows:
        table = tables.setdefault(row[id_column] if id_column else "", SeriesTable([[] for _ in columns]))
        where = f"{path}, line {rows.line_num}"
        for values, column in zip(table.values, columns, strict=True):
            values.append(_number(row[column], column, where))
        if timestamp_column:
            _add_time(table, row[timestamp_column], timestamp_column, where)
    if not tables:
        raise DataError(f"{path} has a header but no rows.")
    return tables


def _number(text: str | None, column: str, where: str) -> float:
    """A finite number, or NaN for an empty cell."""
    if text is None or text.strip().lower() in ("", "na", "nan"):
        return math.nan
    try:
        value = float(text)
    except ValueError as error:
        raise DataError(f"{where}: {column} is {text!r}; must be a number or empty.") from error
    if math.isinf(value):
        raise DataError(f"{where}: {column} is {text!r}; must be finite.")
    return value


def _add_time(table: SeriesTable, text: str | None, column: str, where: str) -> None:
    try:
        time = datetime.fromisoformat((text or "").strip().removesuffix("Z")).replace(tzinfo=None)
    except ValueError as error:
        raise DataError(
            f"{where}: {column} is {text!r}; must be a time such as 2000-06-05T00:30:00."
        ) from error
    if table.times and time <= table.times[-1]:
        raise DataError(
            f"{where}: {column} is {text!r}, not later than the row before; sort the file by time."
        )
    table.times.append(time)
