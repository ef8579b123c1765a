"""Fashion-MNIST and CIFAR-10: small image sets that are read whole."""

from __future__ import annotations

import gzip
import logging
import math
import zlib
from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from hpc_oialr.data.base import DataConfig, Splits
from hpc_oialr.data.fetch import (
    CIFAR10_FILES,
    CIFAR10_IMAGES,
    CIFAR10_RECORD,
    FASHION_MNIST_SYSTEM_FOLDER,
    cache_root,
    describe,
)
from hpc_oialr.data.image_arrays import FlipAndCrop, ImageArrays, Values, split_off
from hpc_oialr.errors import ConfigError, DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImageSet(DataConfig):
    """What Fashion-MNIST and CIFAR-10 have in common."""

    data_dir: str | None = None
    validation: int = 0
    augment: FlipAndCrop = field(default_factory=FlipAndCrop)
    limit: int | None = None

    title: ClassVar[str]
    # Its name for oialr data fetch; names of its folder in another one; folders that have it beside the cache.
    name: ClassVar[str]
    folders: ClassVar[tuple[str, ...]]
    system_folders: ClassVar[tuple[str, ...]] = ()
    # Training and all images; mean and standard deviation of the training pixels, scaled to [0, 1].
    images: ClassVar[tuple[int, int]]
    mean: ClassVar[Values]
    std: ClassVar[Values]
    num_labels: ClassVar[int] = 10
    num_channels: ClassVar[int]
    image_size: ClassVar[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_validation(self.images[0])

    def _check_validation(self, images: int) -> None:
        if not 0 <= self.validation < images:
            rule = f"must lie in [0, {images}), the number of training images"
            raise ConfigError("data.validation", self.validation, rule, fix="5000 is usual.")

    def folder(self) -> Path:
        """The first folder that has the files, not checked yet; :class:`DataError` lists where it looked."""
        if self.data_dir is None:
            places = [cache_root() / self.name, *map(Path, self.system_folders)]
        else:
            places = [Path(self.data_dir), *(Path(self.data_dir) / name for name in self.folders)]
        return describe(self.name).find(places, self.title)

    @classmethod
    @abstractmethod
    def read(cls, folder: Path, *, training: bool) -> tuple[Tensor, Tensor]:
        """Images, uint8 [N, C, H, W], and labels, int64 [N]."""

    def _load(self) -> Splits:
        folder = self.folder()
        images, labels = self.read(folder, training=True)
        self._check_validation(len(labels))
        train = ImageArrays(images, labels, mean=self.mean, std=self.std, augment=self.augment)
        test = ImageArrays(*self.read(folder, training=False), mean=self.mean, std=self.std)
        found, wanted = len(train) + len(test), self.images[1]
        if found != wanted:
            log.warning("%s holds %d images, not the %d of %s.", folder, found, wanted, self.title)
        return split_off(train, self.validation, test, self.num_labels)


@dataclass(frozen=True, kw_only=True)
class FashionMNIST(ImageSet):
    """Fashion-MNIST: 60,000 training and 10,000 test images of clothes, 28 x 28 grey (arXiv 1708.07747).

    Parameters
    ----------
    data_dir
        Folder of the four .gz files (or of a folder ``fashion-mnist`` with them), checked by sha256. Not given:
        the cache, then ``/usr/share/datasets/fashion-mnist`` of the Debian package.
    validation
        Training images set aside, the last of a fixed permutation: the same for every seed.
    augment
        Random flip and crop of the training images.
    limit
        Use only the first so many training images.
    """

    title = "Fashion-MNIST"
    name, folders = "fashion-mnist", ("fashion-mnist",)
    system_folders = (FASHION_MNIST_SYSTEM_FOLDER,)
    images = (60_000, 70_000)
    mean, std = 0.2860, 0.3530
    num_channels, image_size = 1, 28

    @classmethod
    def read(cls, folder: Path, *, training: bool) -> tuple[Tensor, Tensor]:
        """Images, uint8 [N, 1, 28, 28], and labels, int64 [N]."""
        part, dataset = "train" if training else "t10k", describe(cls.name)
        names = (f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz")
        images, labels = (parse_idx(dataset.read(folder / name), name) for name in names)
        return images.unsqueeze(1), labels.to(torch.int64)


@dataclass(frozen=True, kw_only=True)
class CIFAR10(ImageSet):
    """CIFAR-10: 50,000 training and 10,000 test colour images of ten classes, 32 x 32 (Krizhevsky 2009).

    Parameters
    ----------
    data_dir
        Folder of the binary files ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin`` (or of a
        folder ``cifar-10`` or ``cifar-10-batches-bin`` with them). Not given: the cache.
    validation
        Training images set aside, the last of a fixed permutation: the same for every seed.
    augment
        Random flip and crop of the training images.
    limit
        Use only the first so many training images.
    """

    title = "CIFAR-10"
    name, folders = "cifar-10", ("cifar-10", "cifar-10-batches-bin")
    images = (5 * CIFAR10_IMAGES, 6 * CIFAR10_IMAGES)
    # Of each channel, as in the published runs.
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    num_channels, image_size = 3, 32

    @classmethod
    def read(cls, folder: Path, *, training: bool) -> tuple[Tensor, Tensor]:
        """Images, uint8 [N, 3, 32, 32], and labels, int64 [N]; records of a label and 3 planes."""
        dataset, parts = describe(cls.name), []
        for name in CIFAR10_FILES[:-1] if training else CIFAR10_FILES[-1:]:
            content = dataset.read(folder / name)
            if not content or len(content) % CIFAR10_RECORD:
                raise DataError(
                    f"{folder / name} is damaged: it has {len(content)} bytes, no whole number of records of "
                    f"{CIFAR10_RECORD} bytes. {dataset.fix_damage}"
                )
            part = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, CIFAR10_RECORD)
            if (label := int(part[:, 0].max())) >= cls.num_labels:
                raise DataError(
                    f"{folder / name} is damaged: label {label}, but CIFAR-10 has 0 to 9. {dataset.fix_damage}"
                )
            parts.append(part)
        records = torch.cat(parts)
        return records[:, 1:].reshape(-1, 3, 32, 32).contiguous(), records[:, 0].to(torch.int64)


def parse_idx(content: bytes, name: str) -> Tensor:
    """Gzipped IDX bytes (a header of big-endian sizes, then unsigned bytes) as a tensor of the header's shape."""
    try:
        data = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name} does not unpack: {error}.") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08" or data[3] == 0:
        raise DataError(f"{name} is no IDX file of unsigned bytes: it begins with {data[:4].hex()!r}.")
    begin = 4 + 4 * data[3]
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, begin, 4))
    if len(data) - begin != math.prod(shape):
        raise DataError(f"{name} does not hold the {math.prod(shape)} bytes its header {shape} promises.")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=begin).view(shape)
