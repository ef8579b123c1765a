from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_oialr.data import ETT, TimeSeriesCSV
from hpc_oialr.data.ett import COLUMNS
from hpc_oialr.data.timeseries import SeriesWindows, calendar_features
from hpc_oialr.errors import ConfigError, DataError

SMALL = {"context_length": 6, "horizon": 3, "lags_sequence": (1, 4)}


def write(path: Path, rows: list[str], header: str = "date,value") -> str:
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


def half_hours(n: int) -> list[datetime]:
    return [datetime(2000, 6, 5) + timedelta(minutes=30 * i) for i in range(n)]


@pytest.fixture
def csv(tmp_path: Path) -> str:
    """100 half-hours of a wave."""
    rows = [f"{t.isoformat()}Z,{10 + np.sin(i):.6f}" for i, t in enumerate(half_hours(100))]
    return write(tmp_path / "wave.csv", rows)


def windows(part: object) -> SeriesWindows:
    assert isinstance(part, SeriesWindows)
    return part


def test_windows_equal_slices_of_the_standardised_series(csv: str) -> None:
    config = TimeSeriesCSV(path=csv, timestamp_column="date", **SMALL)
    splits = config.build()
    raw = np.array([float(f"{10 + np.sin(i):.6f}") for i in range(100)])
    scaled = (raw - raw[:70].mean()) / raw[:70].std()
    past, length = config.past_length, config.past_length + 3
    assert past == 10
    for part, first, count in (
        (splits.train, 0, 70 - 13 + 1),
        (splits.validation, 60, 8),
        (splits.test, 70, 18),
    ):
        part = windows(part)
        assert len(part) == count
        batch = part.gather(torch.arange(count))
        joined = torch.cat((batch["past_values"], batch["future_values"]), dim=1)
        expected = np.stack([scaled[first + i : first + i + length] for i in range(count)])
        np.testing.assert_allclose(joined.numpy(), expected, atol=1e-5)
        features = torch.cat((batch["past_time_features"], batch["future_time_features"]), dim=1)
        assert features.shape == (count, length, config.num_time_features)
        calendar = calendar_features(half_hours(100))
        for i in range(count):
            torch.testing.assert_close(features[i, :, :4], calendar[first + i : first + i + length])
        torch.testing.assert_close(features[:, :, 4], torch.linspace(-0.5, 0.5, length).expand(count, -1))
        assert bool((batch["past_observed_mask"] == 1).all())
    assert (
        (splits.train.series[0].mean, splits.train.series[0].std)
        == pytest.approx(  # type: ignore[attr-defined]
            (raw[:70].mean(), raw[:70].std())
        )
    )


def test_windows_are_views(csv: str) -> None:
    part = windows(TimeSeriesCSV(path=csv, **SMALL).build().train)
    assert part._values.untyped_storage().nbytes() == 100 * 4


def test_columns_and_ids_are_series_of_their_own(tmp_path: Path) -> None:
    rows = [f"a,{i},{-i}" for i in range(40)] + [f"b,{2 * i},{i}" for i in range(30)]
    path = write(tmp_path / "two.csv", rows, header="id,x,y")
    splits = TimeSeriesCSV(path=path, id_column="id", columns=("x", "y"), **SMALL).build()
    train = windows(splits.train)
    assert [one.name for one in train.series] == ["a/x", "a/y", "b/x", "b/y"]
    assert len(train) == 2 * (28 - 12) + 2 * (21 - 12)
    values = train.gather(torch.arange(len(train)))
    joined = torch.cat((values["past_values"], values["future_values"]), dim=1)
    # Straight lines: no window may run from one series into the next.
    assert float(joined.diff(dim=1).diff(dim=1).abs().max()) < 1e-5
    assert values["past_time_features"].shape[2] == 1


def test_missing_values_are_masked_and_zero(tmp_path: Path) -> None:
    path = write(tmp_path / "gaps.csv", ["" if i % 5 == 0 else str(i % 5) for i in range(50)], header="value")
    path_rows = Path(path).read_text().replace("\n\n", "\nNA\n")
    Path(path).write_text(path_rows)
    train = windows(TimeSeriesCSV(path=path, **SMALL).build().train)
    batch = train.gather(torch.tensor([0]))
    assert batch["past_observed_mask"][0].tolist() == [0.0, 1, 1, 1, 1, 0, 1, 1, 1, 1]
    assert batch["future_observed_mask"][0].tolist() == [0.0, 1, 1]
    assert batch["past_values"][0, [0, 5]].tolist() == [0, 0]
    assert train.series[0].mean == pytest.approx(2.5)


@pytest.mark.parametrize("timestamp_column", [None, "date"])
def test_autoformer_takes_the_batch(csv: str, timestamp_column: str | None) -> None:
    from transformers import AutoformerConfig, AutoformerForPrediction

    data = TimeSeriesCSV(path=csv, timestamp_column=timestamp_column, **SMALL)
    torch.manual_seed(0)
    model = AutoformerForPrediction(
        AutoformerConfig(
            prediction_length=data.horizon,
            context_length=data.context_length,
            lags_sequence=list(data.lags_sequence),
            num_time_features=data.num_time_features,
            input_size=data.input_size,
            label_length=3,
            moving_average=3,
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            num_parallel_samples=2,
        )
    )
    batch = data.build().train.gather(torch.arange(4))
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    inputs = {name: value for name, value in batch.items() if name.startswith("past_")}
    forecast = model.generate(**inputs, future_time_features=batch["future_time_features"])
    assert forecast.sequences.shape == (4, 2, 3)


def test_calendar_features_lie_in_range() -> None:
    times = [datetime(2000, 1, 1) + timedelta(minutes=47 * i) for i in range(12_000)]
    features = calendar_features(times)
    assert features.dtype == torch.float32
    assert float(features.min()) >= -0.5
    assert float(features.max()) <= 0.5


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["2000-01-01,1", "2000-01-02,one"], "line 3: value is 'one'; must be a number or empty."),
        (["2000-01-01,inf"], "line 2: value is 'inf'; must be finite."),
        (["yesterday,1"], "line 2: date is 'yesterday'; must be a time such as 2000-06-05T00:30:00."),
        (["2000-01-02,1", "2000-01-01,1"], "line 3: date is '2000-01-01', not later than the row before"),
        ([], "bad.csv has a header but no rows."),
        (
            [f"2000-01-{i:02},1" for i in range(1, 20)],
            "bad.csv is too short: its longest series has 19 steps, and its training part no room for a "
            "window of 103 past and 24 future steps. Lower data.context_length",
        ),
        ([f"2000-01-{i:02}," for i in range(1, 20)], "series value has no value in its training part of 13"),
    ],
)
def test_bad_content_is_named(tmp_path: Path, rows: list[str], message: str) -> None:
    path = write(tmp_path / "bad.csv", rows)
    with pytest.raises(DataError) as caught:
        TimeSeriesCSV(path=path, timestamp_column="date").build()
    assert message in str(caught.value)


def test_missing_file_or_column_is_named(csv: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"wave\.csv has no column demand, when; it has: date, value\."):
        TimeSeriesCSV(path=csv, columns=("demand",), timestamp_column="when").build()
    with pytest.raises(DataError, match=r"x\.csv does not exist\. Set data\.path to a CSV file\."):
        TimeSeriesCSV(path=str(tmp_path / "x.csv")).build()
    assert TimeSeriesCSV(path=str(tmp_path)).file() == Path(csv)
    (tmp_path / "second.csv").touch()
    with pytest.raises(DataError, match=r"holds 2 CSV files, not one\."):
        TimeSeriesCSV(path=str(tmp_path)).file()
    monkeypatch.setenv("OIALR_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"Run `oialr data fetch taylor-30-min`"):
        TimeSeriesCSV().build()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, r"data\.horizon is 0; must be at least 1\."),
        ({"lags_sequence": ()}, r"data\.lags_sequence is \(\); must hold lags of at least 0 steps\."),
        ({"columns": ()}, r"data\.columns is \(\); must name at least one value column\."),
    ],
)
def test_bad_settings_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TimeSeriesCSV(**options)  # type: ignore[arg-type]


@pytest.fixture
def two(tmp_path: Path) -> str:
    """60 rows of two lines."""
    return write(tmp_path / "two.csv", [f"{i},{10 - 2 * i}" for i in range(60)], header="x,y")


def test_columns_as_variables_of_one_series(two: str) -> None:
    alone = TimeSeriesCSV(path=two, columns=("x", "y"), **SMALL)
    config = TimeSeriesCSV(path=two, columns=("x", "y"), multivariate=True, **SMALL)
    assert (alone.input_size, config.input_size) == (1, 2)
    both, each = windows(config.build().train), windows(alone.build().train)
    assert len(each) == 2 * len(both)
    batch, apart = both.gather(torch.arange(5)), each.gather(torch.arange(len(each)))
    assert batch["past_values"].shape == batch["past_observed_mask"].shape == (5, 10, 2)
    assert batch["future_values"].shape == (5, 3, 2)
    assert batch["past_time_features"].shape == (5, 10, 1)
    for variable in (0, 1):
        first = variable * len(both)
        for part in ("past_values", "future_values"):
            assert torch.equal(batch[part][..., variable], apart[part][first : first + 5])
    assert both.series[0].name == "x, y"
    assert both.series[0].mean == (each.series[0].mean, each.series[1].mean)
    assert both._values.untyped_storage().nbytes() == 60 * 2 * 4


def test_parts_of_so_many_steps(two: str) -> None:
    config = TimeSeriesCSV(path=two, columns=("x",), split_steps=(30, 10, 12), **SMALL)
    splits = config.build()
    assert [len(windows(part)) for part in (splits.train, splits.validation, splits.test)] == [18, 8, 10]
    series = windows(splits.test).series[0]
    assert len(series.values) == 52
    assert series.mean == pytest.approx(14.5)
    with pytest.raises(ConfigError, match=r"split_steps is \(50, 10, 1\); must not add up to more than the 60"):
        TimeSeriesCSV(path=two, columns=("x",), split_steps=(50, 10, 1), **SMALL).build()
    with pytest.raises(ConfigError, match=r"split_steps is \(1, 2\); must be three positive numbers"):
        TimeSeriesCSV(split_steps=(1, 2))


def test_other_fetched_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OIALR_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"Run `oialr data fetch ettm2`.*pass --data\.path"):
        TimeSeriesCSV(dataset="ettm2").build()


@pytest.mark.parametrize(("dataset", "rows_per_hour"), [("etth1", 1), ("ettm2", 4)])
def test_ett_has_the_published_parts_and_scaling(tmp_path: Path, dataset: str, rows_per_hour: int) -> None:
    """12, 4 and 4 months of 30 days, scaled by the first 12; windows as many as in the published code."""
    hours, minutes = 20 * 30 * 24 + 50, 60 // rows_per_hour
    rng = np.random.default_rng(0)
    raw = rng.normal(3, 2, (hours * rows_per_hour, 7)).round(4)
    name = f"ETT{dataset[3:]}.csv"
    times = [datetime(2016, 7, 1) + timedelta(minutes=minutes * i) for i in range(len(raw))]
    rows = [f"{time},{','.join(map(str, row))}" for time, row in zip(times, raw.tolist(), strict=True)]
    write(tmp_path / name, rows, header=",".join(("date", *COLUMNS)))
    (tmp_path / "ETTh2.csv").touch()  # the folder has others too
    config = ETT(path=str(tmp_path), dataset=dataset, horizon=24)
    splits = config.build()
    train, validation, test = (months * 30 * 24 * rows_per_hour for months in (12, 4, 4))
    parts = [windows(part) for part in (splits.train, splits.validation, splits.test)]
    assert [len(part) for part in parts] == [train - 96 - 24 + 1, validation - 24 + 1, test - 24 + 1]
    scaled = (raw - raw[:train].mean(0)) / raw[:train].std(0)
    batch = parts[2].gather(torch.tensor([0, test - 24]))
    first = train + validation
    np.testing.assert_allclose(batch["past_values"][0].numpy(), scaled[first - 96 : first], atol=1e-5)
    np.testing.assert_allclose(batch["future_values"][1].numpy(), scaled[first + test - 24 : first + test], atol=1e-5)


def test_ett_refuses_other_data_sets_and_says_where_to_get_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"data\.dataset is 'ETTh3'; must be one of etth1, etth2, ettm1, ettm2"):
        ETT(dataset="ETTh3")
    monkeypatch.setenv("OIALR_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"Run `oialr data fetch ettm1`.*pass --data\.path"):
        ETT(dataset="ettm1").build()
