from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from hpc_oialr.data import FashionMNIST, FlipAndCrop
from hpc_oialr.data.base import SubsetView
from hpc_oialr.data.fetch import FASHION_MNIST_FILES
from hpc_oialr.data.image_arrays import ImageArrays
from hpc_oialr.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return FashionMNIST().folder()
    except DataError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def whole(folder: Path) -> ImageArrays:
    train = FashionMNIST(data_dir=str(folder)).build().train
    assert isinstance(train, ImageArrays)
    return train


def test_all_images_are_there_balanced_and_normalised(whole: ImageArrays, folder: Path) -> None:
    assert torch.bincount(whole.labels).tolist() == [6000] * 10
    pixels = whole.images.double() / 255
    assert float(pixels.mean()) == pytest.approx(FashionMNIST.mean, abs=5e-5)
    assert float(pixels.std()) == pytest.approx(FashionMNIST.std, abs=5e-5)
    test = FashionMNIST(data_dir=str(folder)).build().test
    assert test is not None
    labels = test.gather(torch.arange(10_000))["labels"]
    assert torch.bincount(labels).tolist() == [1000] * 10


def test_batch_has_the_documented_form(whole: ImageArrays) -> None:
    batch = whole.gather(torch.tensor([0, 5, 59_999]))
    assert batch["pixel_values"].shape == (3, 1, 28, 28)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].dtype == torch.int64
    expected = (whole.images[[0, 5, 59_999]].double() / 255 - FashionMNIST.mean) / FashionMNIST.std
    torch.testing.assert_close(batch["pixel_values"].double(), expected, rtol=0, atol=1e-6)


def test_validation_images_are_set_aside_and_limit_cuts_training(folder: Path) -> None:
    splits = FashionMNIST(data_dir=str(folder), validation=5000, limit=300, augment=FlipAndCrop(flip=True)).build()
    larger = FashionMNIST(data_dir=str(folder), validation=6000).build()
    assert isinstance(splits.train, SubsetView)
    assert isinstance(splits.validation, SubsetView)
    assert isinstance(larger.validation, SubsetView)
    assert (len(splits.train), len(splits.validation)) == (300, 5000)
    assert not set(splits.train.indices.tolist()) & set(splits.validation.indices.tolist())
    assert set(splits.validation.indices.tolist()) < set(larger.validation.indices.tolist())
    assert isinstance(splits.train.whole, ImageArrays)
    assert isinstance(splits.validation.whole, ImageArrays)
    assert splits.train.whole.augment is not None
    assert splits.validation.whole.augment is None
    assert splits.train.whole.images is splits.validation.whole.images


def test_no_validation_part_if_none_is_asked_for(folder: Path) -> None:
    assert FashionMNIST(data_dir=str(folder)).build().validation is None


def test_damaged_file_is_named_with_both_checksums(folder: Path, tmp_path: Path) -> None:
    for name in FASHION_MNIST_FILES:
        (tmp_path / name).symlink_to(folder / name)
    bad = tmp_path / "train-labels-idx1-ubyte.gz"
    content = bytearray(bad.read_bytes())
    content[1000] ^= 1
    bad.unlink()
    bad.write_bytes(content)
    with pytest.raises(DataError) as caught:
        FashionMNIST(data_dir=str(tmp_path)).build()
    expected = " or ".join(FASHION_MNIST_FILES[bad.name])
    assert f"{bad} is damaged: expected sha256 {expected}, found " in str(caught.value)
    assert "Delete it and get it again. Run `oialr data fetch fashion-mnist`" in str(caught.value)


def test_upstream_packing_is_accepted(folder: Path, tmp_path: Path) -> None:
    """Upstream's gzip header holds name and time, Debian's does not; the streams are the same."""
    times = {"train": 1504176606, "t10k": 1504176627}
    for name in FASHION_MNIST_FILES:
        content = (folder / name).read_bytes()
        if content[3] == 0:
            time = times[name.split("-")[0]].to_bytes(4, "little")
            stem = name.removesuffix(".gz").encode() + b"\0"
            content = content[:3] + b"\x08" + time + content[8:10] + stem + content[10:]
        (tmp_path / name).write_bytes(content)
    assert len(FashionMNIST(data_dir=str(tmp_path)).build().train) == 60_000


def test_missing_files_list_where_was_looked(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        FashionMNIST(data_dir=str(tmp_path)).build()
    message = str(caught.value)
    assert message.startswith(f"fashion-mnist is not here; looked in {tmp_path} (without train-images")
    assert f"{tmp_path / 'fashion-mnist'} (no such folder)" in message
    assert "Run `oialr data fetch fashion-mnist`" in message
    assert "login node" in message
    assert "--data.data_dir or set OIALR_DATA" in message


def test_cache_is_looked_at_before_the_system_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OIALR_DATA", str(tmp_path))
    own = tmp_path / "fashion-mnist"
    own.mkdir()
    for name in FASHION_MNIST_FILES:
        shutil.copyfile(folder / name, own / name)
    assert FashionMNIST().folder() == own
    assert FashionMNIST(data_dir=str(tmp_path)).folder() == own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": 60_000}, r"data\.validation is 60000; must lie in \[0, 60000\)"),
        ({"validation": -1}, r"data\.validation is -1; must lie in \[0, 60000\)"),
        ({"limit": 0}, r"data\.limit is 0; must be at least 1\. Leave it out for all samples\."),
    ],
)
def test_bad_settings_are_named(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FashionMNIST(**options)
