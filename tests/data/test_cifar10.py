from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_oialr.data import CIFAR10
from hpc_oialr.data.fetch import describe
from hpc_oialr.data.image_arrays import ImageArrays
from hpc_oialr.errors import ConfigError, DataError

NAMES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images a file; image i of file f has label f, and its bytes count on from i in planes."""
    for number, name in enumerate(NAMES):
        records = [bytes([number]) + bytes((i + j // 1024 * 50) % 256 for j in range(3072)) for i in range(3)]
        (tmp_path / name).write_bytes(b"".join(records))
    return tmp_path


def test_records_are_labels_and_planes(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    splits = CIFAR10(data_dir=str(folder)).build()
    assert isinstance(splits.train, ImageArrays)
    assert splits.validation is None
    assert splits.train.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert splits.train.images.shape == (15, 3, 32, 32)
    assert splits.train.images[4, :, 0, 0].tolist() == [1, 51, 101]
    assert splits.test is not None
    batch = splits.test.gather(torch.tensor([2]))
    wanted = (np.array([2, 52, 102]) / 255 - CIFAR10.mean) / CIFAR10.std
    np.testing.assert_allclose(batch["pixel_values"][0, :, 5, 7].numpy(), wanted, atol=1e-5)
    assert batch["labels"].tolist() == [5]
    assert caplog.messages == [f"{folder} holds 18 images, not the 60000 of cifar-10."]


def test_validation_is_set_aside(folder: Path) -> None:
    splits = CIFAR10(data_dir=str(folder), validation=4).build()
    assert splits.validation is not None
    assert (len(splits.train), len(splits.validation)) == (11, 4)
    with pytest.raises(ConfigError, match=r"data\.validation is 15; must lie in \[0, 15\)"):
        CIFAR10(data_dir=str(folder), validation=15).build()
    with pytest.raises(ConfigError, match=r"data\.validation is -1; must lie in \[0, 50000\)"):
        CIFAR10(validation=-1)


def test_files_below_the_folder_are_found(folder: Path) -> None:
    below = folder / "cifar-10-batches-bin"
    below.mkdir()
    for name in NAMES:
        (folder / name).rename(below / name)
    assert CIFAR10(data_dir=str(folder)).folder() == below


def test_missing_and_damaged_files_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "data_batch_2.bin").write_bytes(bytes(100))
    with pytest.raises(DataError, match=r"data_batch_2\.bin is damaged: it has 100 bytes, not a multiple of 3073"):
        CIFAR10(data_dir=str(folder)).build()
    (folder / "data_batch_2.bin").write_bytes(bytes([77]) * 3073)
    with pytest.raises(DataError, match=r"data_batch_2\.bin is damaged: label 77, but CIFAR-10 has 0 to 9"):
        CIFAR10(data_dir=str(folder)).build()
    (folder / "data_batch_2.bin").unlink()
    with pytest.raises(DataError, match=r"cifar-10 is not here; looked in .*oialr data fetch cifar-10"):
        CIFAR10(data_dir=str(folder)).build()


def test_a_fetched_copy_has_the_size_of_the_real_one(folder: Path) -> None:
    fault = describe("cifar-10").fault(folder)
    assert fault == f"{folder / NAMES[0]} is damaged: expected 30730000 bytes, found 9219"
    (folder / NAMES[0]).unlink()
    assert describe("cifar-10").fault(folder) == f"{folder / NAMES[0]} is missing"
