from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hpc_oialr.data import CIFAR10, FashionMNIST, ImageFolder, TimeSeriesCSV, write_sample
from hpc_oialr.data.samples import ETTM2_COLUMNS
from hpc_oialr.data.timeseries import SeriesWindows
from hpc_oialr.errors import DataError, UnknownNameError


@pytest.fixture(autouse=True)
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests must not fetch what samples are made from."""
    try:
        clothes = FashionMNIST().folder()
    except DataError as error:
        pytest.skip(str(error))
    demand = tmp_path_factory.mktemp("demand")
    (demand / "taylor_30_min.csv").write_text("value\n" + "\n".join(str(i % 48) for i in range(4032)))
    places = {"fashion-mnist": clothes, "taylor-30-min": demand}
    monkeypatch.setattr("hpc_oialr.data.samples.fetch", places.__getitem__)


def test_image_folder(tmp_path: Path) -> None:
    folder = write_sample("imagenet", tmp_path / "imagenet")
    splits = ImageFolder(path=str(folder), size=32).build()
    assert splits.validation is not None
    assert (len(splits.train), len(splits.validation)) == (120, 40)
    batch = splits.validation.gather(torch.arange(0, 40, 4))
    assert batch["labels"].tolist() == list(range(10))
    assert float(splits.validation.finish(batch)["pixel_values"].std()) > 0.5
    assert not set(folder.rglob("*.JPEG")).isdisjoint(folder.glob("train/clothes_3/*"))


def test_cifar10(tmp_path: Path) -> None:
    folder = write_sample("cifar-10", tmp_path / "c")
    splits = CIFAR10(data_dir=str(folder)).build()
    assert splits.test is not None
    assert (len(splits.train), len(splits.test)) == (320, 64)
    assert splits.train.gather(torch.arange(320))["labels"].unique().tolist() == list(range(10))


def test_ettm2(tmp_path: Path) -> None:
    folder = write_sample("ettm2", tmp_path / "e")
    config = TimeSeriesCSV(
        path=str(folder), columns=ETTM2_COLUMNS, multivariate=True, timestamp_column="date", horizon=192
    )
    train = config.build().train
    assert isinstance(train, SeriesWindows)
    assert len(train.series[0].values) == 2 * 4032 - 1
    assert train.gather(torch.arange(2))["future_values"].shape == (2, 192, 7)


def test_a_sample_is_made_once_and_marked_as_one(tmp_path: Path) -> None:
    folder = write_sample("cifar-10", tmp_path / "c")
    assert "smoke runs only: not the real data" in (folder / "SAMPLE.txt").read_text()
    (folder / "test_batch.bin").unlink()
    assert write_sample("cifar-10", folder) == folder
    assert not (folder / "test_batch.bin").exists()
    with pytest.raises(DataError, match=r"c holds other files\. Name a new folder for the sample"):
        write_sample("ettm2", folder)
    with pytest.raises(UnknownNameError, match="unknown sample 'ettm'; valid: cifar-10, ettm2, imagenet"):
        write_sample("ettm", tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
