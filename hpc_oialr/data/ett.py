"""Electricity transformer temperature (ETT) with the split and the scaling of the published benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hpc_oialr.data.fetch import CATALOG
from hpc_oialr.data.timeseries import TimeSeriesCSV
from hpc_oialr.errors import ConfigError

COLUMNS = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
# Months of 30 days that train, validate and test; the rest of the two years is left out. arXiv 2012.07436.
MONTHS = (12, 4, 4)
ROWS_PER_HOUR = {"etth1": 1, "etth2": 1, "ettm1": 4, "ettm2": 4}


@dataclass(frozen=True, kw_only=True)
class ETT(TimeSeriesCSV):
    """One of ETTh1, ETTh2 (hourly), ETTm1 and ETTm2 (every 15 minutes): seven variables, forecast together.

    The first 12 months of 30 days train, the next 4 validate, 4 more test; all are scaled by mean and standard
    deviation of the training months (arXiv 2012.07436). Metrics are of scaled values, as published. Parameters as for
    :class:`TimeSeriesCSV`, with these defaults.

    Parameters
    ----------
    dataset
        "etth1", "etth2", "ettm1" or "ettm2".
    path
        Its CSV, or a folder that has it; not given: what ``oialr data fetch DATASET`` got.
    split_steps
        Steps of the three parts; not given: the published ones.
    lags_sequence
        ``[0]``: the published network sees the context alone, and its last value too.
    """

    dataset: str = "etth1"
    columns: tuple[str, ...] = COLUMNS
    multivariate: bool = True
    timestamp_column: str | None = "date"
    horizon: int = 96
    lags_sequence: tuple[int, ...] = (0,)

    names: ClassVar[tuple[str, ...]] = tuple(ROWS_PER_HOUR)

    def __post_init__(self) -> None:
        if self.dataset not in ROWS_PER_HOUR:
            fix = "For other series choose TimeSeriesCSV."
            raise ConfigError("data.dataset", self.dataset, f"must be one of {', '.join(self.names)}", fix=fix)
        if not self.split_steps:
            month = 30 * 24 * ROWS_PER_HOUR[self.dataset]
            object.__setattr__(self, "split_steps", tuple(months * month for months in MONTHS))
        super().__post_init__()

    def file(self) -> Path:
        """The CSV that is read; in a folder the one of this data set."""
        (name,) = CATALOG[self.dataset].files
        if self.path is not None and (Path(self.path) / name).is_file():
            return Path(self.path) / name
        return super().file()
