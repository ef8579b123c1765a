"""Forecasting windows from a CSV, in the form that transformers' Autoformer takes."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hpc_oialr.data.base import ArrayDataset, Batch, CounterRNG, DataConfig, Splits, check_fractions
from hpc_oialr.data.fetch import cache_root, describe
from hpc_oialr.errors import ConfigError, DataError

# Of one series a list for each value column, NaN if empty, and times without zone, if there is a time column.
SeriesTable = tuple[list[list[float]], list[datetime]]


def read_series(
    path: Path, columns: Sequence[str], *, id_column: str | None = None, timestamp_column: str | None = None
) -> dict[str, SeriesTable]:
    """Series of a CSV with a header, by id; without ``id_column`` the file is one series, named "".

    Times are ISO 8601 and ascend within a series. A :class:`DataError` names file, line, column and value.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Set data.path to a CSV file.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}.") from error
    rows = csv.DictReader(io.StringIO(text, newline=""))
    header = rows.fieldnames or ()
    missing = [name for name in (*columns, id_column, timestamp_column) if name and name not in header]
    if missing:
        raise DataError(f"{path} has no column {', '.join(missing)}; it has: {', '.join(header) or 'none'}.")
    tables: dict[str, SeriesTable] = {}
    for row in rows:
        series, times = tables.setdefault(row[id_column] if id_column else "", ([[] for _ in columns], []))
        for values, column in zip(series, columns, strict=True):
            cell = row[column]
            try:
                empty = cell is None or cell.strip().lower() in ("", "na", "nan")
                values.append(math.nan if empty else float(cell))
                fault = "must be finite" if math.isinf(values[-1]) else None
            except ValueError:
                fault = "must be a number or empty"
            if fault:
                raise DataError(f"{path}, line {rows.line_num}: {column} is {cell!r}; {fault}.")
        if timestamp_column:
            cell = row[timestamp_column]
            where = f"{path}, line {rows.line_num}: {timestamp_column} is {cell!r}"
            try:
                time = datetime.fromisoformat((cell or "").strip().removesuffix("Z")).replace(tzinfo=None)
            except ValueError as error:
                raise DataError(f"{where}; must be a time such as 2000-06-05T00:30:00.") from error
            if times and time <= times[-1]:
                raise DataError(f"{where}, not later than the row before; sort the file by time.")
            times.append(time)
    if not tables:
        raise DataError(f"{path} has a header but no rows.")
    return tables


@dataclass(frozen=True)
class Series:
    """One series, standardised by its training part: ``original = values * std + mean``, for every variable."""

    name: str  # its id and column
    values: Tensor  # 0 where nothing was observed, float32 [steps]; of several variables [steps, variables]
    observed: Tensor  # 1 or 0, float32, of the shape of values
    calendar: Tensor | None  # see calendar_features; None without a time column
    bounds: tuple[int, int]  # steps at which training and validation end
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]


class SeriesWindows(ArrayDataset):
    """Windows of ``past`` and ``future`` steps from ``starts`` of each series on; only batches are copied."""

    def __init__(self, series: Sequence[Series], starts: Sequence[range], *, past: int, future: int) -> None:
        self.series, self.past = tuple(series), past
        offsets = np.cumsum([0, *(len(one.values) for one in series)])
        shifted = [np.arange(r.start, r.stop) + o for r, o in zip(starts, offsets, strict=False)]
        self.starts = torch.from_numpy(np.concatenate(shifted).astype(np.int64))

        def windows(parts: Sequence[Tensor]) -> Tensor:
            """Views [steps - length + 1, length, ...] of the joined series, [steps, ...] each."""
            return torch.cat(tuple(parts)).unfold(0, past + future, 1).movedim(-1, 1)

        self._values = windows([one.values for one in series])
        self._observed = windows([one.observed for one in series])
        calendars = [one.calendar for one in series if one.calendar is not None]
        self._calendar = windows(calendars) if calendars else None
        self._age = torch.linspace(-0.5, 0.5, past + future)[:, None]

    def __len__(self) -> int:
        return len(self.starts)

    def gather(self, indices: Tensor, rng: CounterRNG | None = None) -> Batch:
        """Windows as float32 tensors with the names of transformers' ``AutoformerForPrediction``.

        ``past_values``, ``past_observed_mask`` [B, past]; ``past_time_features`` [B, past, features]; ``future_``
        likewise. Values and masks of series of several variables have these as a last axis.
        """
        starts = self.starts.index_select(0, indices)
        features = self._age.expand(len(starts), -1, -1)
        if self._calendar is not None:
            features = torch.cat((self._calendar[starts], features), dim=2)
        values, mask = self._values[starts], self._observed[starts]
        arrays = {"values": values, "observed_mask": mask, "time_features": features}
        past = {f"past_{name}": array[:, : self.past] for name, array in arrays.items()}
        return past | {f"future_{name}": array[:, self.past :] for name, array in arrays.items()}


@dataclass(frozen=True, kw_only=True)
class TimeSeriesCSV(DataConfig):
    """Windows over the series of a CSV; each value column (of each id) is a series of its own, or a variable.

    The split is by time: the first steps train, the last test. A window belongs to the part that its
    whole future lies in; its past may reach back into the part before.

    Parameters
    ----------
    path, dataset
        The CSV, or a folder with one; not given: the ``dataset`` that ``oialr data fetch`` gets.
    columns, multivariate
        Value columns; if multivariate they are variables of one series, forecast together.
    id_column
        Column that tells series apart.
    timestamp_column
        Column of ISO 8601 times, ascending. With it, each step has features for time of day, day of
        week, day of month and day of year beside its age in the window; without it, the age alone.
    context_length, horizon
        Steps the model sees, without its lags, and steps to forecast.
    lags_sequence
        How far back the model's lagged inputs reach; a window has ``max(lags_sequence)`` more past steps. 0 is the
        step itself, for models that are not given the future.
    validation_fraction, test_fraction
        Share of the steps of each series.
    split_steps
        Steps of the training, validation and test part instead; later ones are left out.
    """

    path: str | None = None
    dataset: str = "taylor-30-min"
    columns: tuple[str, ...] = ("value",)
    multivariate: bool = False
    id_column: str | None = None
    timestamp_column: str | None = None
    context_length: int = 96
    horizon: int = 24
    lags_sequence: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7)
    validation_fraction: float = 0.1
    test_fraction: float = 0.2
    split_steps: tuple[int, ...] = ()
    limit: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fractions(self.validation_fraction, self.test_fraction)
        lags, parts = self.lags_sequence, self.split_steps
        three = "must be three positive numbers: training, validation, test"
        for name, good, rule in (
            ("context_length", self.context_length >= 1, "must be at least 1"),
            ("horizon", self.horizon >= 1, "must be at least 1"),
            ("columns", len(self.columns) > 0, "must name at least one value column"),
            ("lags_sequence", lags and min(lags) >= 0, "must hold lags of at least 0 steps"),
            ("split_steps", not parts or (len(parts) == 3 and min(parts) >= 1), three),
        ):
            if not good:
                raise ConfigError(f"data.{name}", getattr(self, name), rule)

    @property
    def input_size(self) -> int:
        """Variables of each series."""
        return len(self.columns) if self.multivariate else 1

    @property
    def past_length(self) -> int:
        """Past steps of a window: the context and what the lags look back to."""
        return self.context_length + max(self.lags_sequence)

    @property
    def num_time_features(self) -> int:
        """Features of each step: its age in the window, and four of the calendar."""
        return 5 if self.timestamp_column else 1

    def file(self) -> Path:
        """The CSV that is read; :class:`DataError` if there is none, or a folder with several."""
        path = cache_root() / self.dataset if self.path is None else Path(self.path)
        found = sorted(path.glob("*.csv")) if path.is_dir() else [path] * path.is_file()
        if len(found) == 1:
            return found[0]
        fix = describe(self.dataset).fix if self.path is None else "Set data.path to a CSV file."
        what = f"holds {len(found)} CSV files, not one" if path.is_dir() else "does not exist"
        raise DataError(f"time series {path} {what}. {fix}")

    def _load(self) -> Splits:
        path = self.file()
        tables = read_series(path, self.columns, id_column=self.id_column, timestamp_column=self.timestamp_column)
        series = [one for name, table in tables.items() for one in self._standardised(path, name, *table)]
        return Splits(
            self._windows(path, series, 0),
            self._windows(path, series, 1) if self.split_steps or self.validation_fraction else None,
            self._windows(path, series, 2) if self.split_steps or self.test_fraction else None,
        )

    def _standardised(self, path: Path, name: str, columns: list[list[float]], times: list[datetime]) -> list[Series]:
        training, validation, end = self._ends(path, len(columns[0]))
        calendar = calendar_features(times[:end]) if times else None
        labels = [f"{name}/{column}" if name else column for column in self.columns]
        values = np.array(columns, dtype=np.float64)[:, :end]
        seen = ~np.isnan(values)
        means, stds = [], []
        for label, row, there in zip(labels, values[:, :training], seen, strict=True):
            known = row[there[:training]]
            if not len(known):
                where = f"in its training part of {training} steps"
                raise DataError(f"{path}: series {label} has no value {where}.")
            means.append(float(known.mean()))
            stds.append(float(known.std()) or 1.0)
        scaled = (values - np.array(means)[:, None]) / np.array(stds)[:, None]
        scaled = torch.from_numpy(np.where(seen, scaled, 0.0).astype(np.float32))
        observed, bounds = torch.from_numpy(seen.astype(np.float32)), (training, validation)
        if self.multivariate:
            joined = scaled.T.contiguous(), observed.T.contiguous()
            return [Series(", ".join(labels), *joined, calendar, bounds, tuple(means), tuple(stds))]
        alone = zip(labels, scaled, observed, means, stds, strict=True)
        return [Series(label, x, o, calendar, bounds, mean, std) for label, x, o, mean, std in alone]

    def _ends(self, path: Path, steps: int) -> tuple[int, int, int]:
        """Where the three parts of a series of so many steps end."""
        if self.split_steps:
            training, validation, test = self.split_steps
            if training + validation + test > steps:
                rule = f"must not add up to more than the {steps} rows of a series in {path}"
                raise ConfigError("data.split_steps", self.split_steps, rule)
            return training, training + validation, training + validation + test
        test_at = steps - round(self.test_fraction * steps)
        return test_at - round(self.validation_fraction * steps), test_at, steps

    def _windows(self, path: Path, series: Sequence[Series], part: int) -> SeriesWindows:
        """All windows whose future lies in part 0, 1 or 2: training, validation or test."""
        starts = []
        for one in series:
            edges = (0, *one.bounds, len(one.values))
            first = max(0, edges[part] - self.past_length)
            starts.append(range(first, max(first, edges[part + 1] - self.past_length - self.horizon + 1)))
        if not any(starts):
            longest, name = max(len(one.values) for one in series), ("training", "validation", "test")[part]
            raise DataError(
                f"{path} is too short: its longest series has {longest} steps, and its {name} part no room "
                f"for a window of {self.past_length} past and {self.horizon} future steps. "
                "Lower data.context_length, data.lags_sequence or data.horizon, or change the fractions."
            )
        return SeriesWindows(series, starts, past=self.past_length, future=self.horizon)


def calendar_features(times: Sequence[datetime]) -> Tensor:
    """Time of day, day of week, of month and of year, each in [-0.5, 0.5], float32 [steps, 4].

    Examples
    --------
    >>> calendar_features([datetime(2000, 1, 3, 12)])
    tensor([[ 0.0000, -0.5000, -0.4333, -0.4945]])
    """
    rows = [
        (
            (t.hour * 3600 + t.minute * 60 + t.second) / 86400 - 0.5,
            t.weekday() / 6 - 0.5,
            (t.day - 1) / 30 - 0.5,
            (t.timetuple().tm_yday - 1) / 365 - 0.5,
        )
        for t in times
    ]
    return torch.tensor(rows, dtype=torch.float32)
