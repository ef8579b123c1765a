from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.image_files import write_image_folder
from torch import Tensor

from hpc_oialr.data import ArrayDataset, GlobalBatches, ImageFolder
from hpc_oialr.data.base import SubsetView
from hpc_oialr.data.image_folder import MEAN, STD, ImageFiles
from hpc_oialr.errors import ConfigError, DataError, SampleError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("images"))


def files(part: ArrayDataset | None) -> ImageFiles:
    assert isinstance(part, ImageFiles)
    return part


def test_files_are_listed_by_class_and_name(folder: Path) -> None:
    splits = ImageFolder(path=str(folder), size=16).build()
    train = files(splits.train)
    assert (len(train), len(files(splits.validation)), splits.test) == (16, 8, None)
    assert [train.path(i) for i in (0, 7, 8)] == [
        folder / "train" / name for name in ("class_0/0.JPEG", "class_0/7.JPEG", "class_1/0.JPEG")
    ]
    assert train.labels.tolist() == [0] * 8 + [1] * 8


def test_training_is_random_and_evaluation_is_the_middle(folder: Path) -> None:
    splits = ImageFolder(path=str(folder), size=16, evaluation_size=20).build()
    batch = splits.train.gather(torch.tensor([9, 2]))
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["pixel_values"].dtype == torch.uint8, "floats are made on the device"
    assert splits.train.finish(batch)["pixel_values"].dtype == torch.float32
    assert batch["labels"].tolist() == [1, 0]
    validation = files(splits.validation)
    assert validation.gather(torch.arange(2))["pixel_values"].shape == (2, 3, 20, 20)
    assert validation.middle(40, 30).box == (20 - 13.125, 15 - 13.125, 20 + 13.125, 15 + 13.125)
    assert validation.augment is None


def test_pixels_are_normalised_by_channel(tmp_path: Path) -> None:
    from PIL import Image

    for part in ("train", "val"):
        (tmp_path / part / "grey").mkdir(parents=True)
        Image.new("RGB", (20, 20), (255, 0, 51)).save(tmp_path / part / "grey" / "a.png")
    train = ImageFolder(path=str(tmp_path), size=4, limit=1).build().train
    assert isinstance(train, SubsetView)
    pixels = train.example(2)["pixel_values"]
    wanted = (np.array([1.0, 0.0, 0.2]) - MEAN) / STD
    torch.testing.assert_close(pixels[0, :, 0, 0].double(), torch.from_numpy(wanted), atol=1e-5, rtol=0)


def pixels_of(dataset: ArrayDataset, size: int, epoch: int, start: int = 0) -> list[Tensor]:
    """Global batches of one epoch, joined from the slices of ``size`` processes."""
    slices = [
        GlobalBatches(dataset, 8, world_rank=rank, world_size=size, seed=5, training=True) for rank in range(size)
    ]
    parts = zip(*(batches.epoch(epoch, start) for batches in slices), strict=True)
    return [torch.cat([batch["pixel_values"] for batch in step]) for step in parts]


def test_the_same_for_any_number_of_processes_and_after_a_resume(folder: Path) -> None:
    train = ImageFolder(path=str(folder), size=16).build().train
    alone = pixels_of(train, 1, epoch=3)
    assert len(alone) == 2
    for other in (pixels_of(train, 2, epoch=3), pixels_of(train, 4, epoch=3)):
        assert all(torch.equal(a, b) for a, b in zip(alone, other, strict=True))
    assert torch.equal(pixels_of(train, 2, epoch=3, start=1)[0], alone[1])
    assert not torch.equal(pixels_of(train, 1, epoch=4)[0], alone[0])


def test_limit_takes_all_classes(folder: Path) -> None:
    train = ImageFolder(path=str(folder), size=8, limit=6).build().train
    assert isinstance(train, SubsetView)
    assert len(train) == 6
    assert set(train.gather(torch.arange(6))["labels"].tolist()) == {0, 1}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_ends_the_epoch_with_its_name(folder: Path, tmp_path: Path, workers: int) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    bad = tmp_path / "copy" / "train" / "class_1" / "3.JPEG"
    bad.write_bytes(bad.read_bytes()[:200])
    train = ImageFolder(path=str(tmp_path / "copy"), size=8).build().train
    batches = GlobalBatches(train, 4, seed=0, training=True, num_workers=workers)
    with pytest.raises(SampleError) as caught:
        list(batches.epoch(0))
    assert str(caught.value).startswith(f"{bad} cannot be read as an image: ")
    assert "Traceback" not in str(caught.value)


def test_folders_of_another_form_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere/train cannot be read: No such file .* Set data\.path to"):
        ImageFolder(path=str(tmp_path / "nowhere")).build()
    shutil.copytree(folder / "train", tmp_path / "train")
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match=r"val has no folders of classes\. Sort its images"):
        ImageFolder(path=str(tmp_path)).build()
    (tmp_path / "val" / "class_7").mkdir()
    with pytest.raises(DataError, match=r"val/class_7 is a class that train/ does not have; it has 2"):
        ImageFolder(path=str(tmp_path)).build()
    (tmp_path / "val" / "class_7").rename(tmp_path / "val" / "class_1")
    with pytest.raises(DataError, match=r"val/class_1 has no image \(\.jpg, .*\)\. Fill it or remove it"):
        ImageFolder(path=str(tmp_path)).build()


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match=r"data\.size is 0; must be at least 1 pixel"):
        ImageFolder(size=0)
    with pytest.raises(ConfigError, match=r"data\.evaluation_share is 0; must lie in \(0, 1\]"):
        ImageFolder(evaluation_share=0)
