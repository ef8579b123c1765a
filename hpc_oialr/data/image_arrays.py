"""Fashion-MNIST and CIFAR-10: small image sets, in memory as bytes."""

from __future__ import annotations

import gzip
import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hpc_oialr.data.base import ArrayDataset, Batch, CounterRNG, DataConfig, OnDevice, Splits, fixed_order
from hpc_oialr.data.fetch import CIFAR10_FILES, FASHION_MNIST_SYSTEM_FOLDER, cache_root, describe
from hpc_oialr.errors import ConfigError, DataError

log = logging.getLogger(__name__)

Values = float | Sequence[float]
_FLIP, _ROW, _COLUMN = 1, 2, 3  # streams of random numbers; 0 is the order of the samples


@dataclass(frozen=True, kw_only=True)
class FlipAndCrop:
    """Random horizontal flip, and a random crop of the padded image; both off by default.

    Parameters
    ----------
    flip
        Flip left and right with probability 1/2.
    padding
        Zeros put around the image before a crop of its own size, in pixels.
    """

    flip: bool = False
    padding: int = 0

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ConfigError("data.augment.padding", self.padding, "must be at least 0")

    def __call__(self, images: Tensor, samples: Tensor, rng: CounterRNG) -> Tensor:
        """Augment images [B, C, H, W] by the random numbers of ``samples``, int64 [B]."""
        batch, channels, height, width = images.shape
        span = 2 * self.padding + 1
        rows = torch.arange(height, device=images.device) + rng.integers(samples, span, stream=_ROW)[:, None]
        columns = torch.arange(width, device=images.device).expand(batch, -1)
        if self.flip:
            flipped = rng.integers(samples, 2, stream=_FLIP)[:, None].bool()
            columns = torch.where(flipped, columns.flip(1), columns)
        columns = columns + rng.integers(samples, span, stream=_COLUMN)[:, None]
        # Row and column of the padded image for every pixel of the result.
        padded = F.pad(images, (self.padding,) * 4)
        picked = rows[:, :, None] * padded.shape[-1] + columns[:, None, :]
        flat = picked.reshape(batch, 1, height * width).expand(-1, channels, -1)
        return padded.flatten(2).gather(2, flat).view(images.shape)


class Normalisation:
    """Pixels as floats of mean 0 and standard deviation 1: ``(pixels / 255 - mean) / std``.

    ``mean`` and ``std`` are one number, or one for each channel.
    """

    def __init__(self, mean: Values, std: Values) -> None:
        self.mean, self.std = mean, std
        m, s = (torch.tensor(each, dtype=torch.float64).reshape(-1, 1, 1) for each in (mean, std))
        self.factor, self.shift = (1 / (255 * s)).float(), (-m / s).float()

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] as float32."""
        if self.factor.device != images.device:
            self.factor, self.shift = self.factor.to(images.device), self.shift.to(images.device)
        return images.to(torch.float32).mul_(self.factor).add_(self.shift)


class ImageArrays(ArrayDataset):
    """Images stored as uint8 [N, C, H, W]; batches are normalised floats."""

    movable = ("images", "labels")

    def __init__(
        self, images: Tensor, labels: Tensor, *, mean: Values, std: Values, augment: FlipAndCrop | None = None
    ) -> None:
        self.images, self.labels = images, labels
        self.normalise = Normalisation(mean, std)
        self.augment = augment if augment is not None and (augment.flip or augment.padding) else None

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, indices: Tensor, rng: CounterRNG | None = None) -> Batch:
        """``{"pixel_values": float32 [B, C, H, W], "labels": int64 [B]}``."""
        indices = indices.to(self.images.device)
        images = self.images.index_select(0, indices)
        if self.augment is not None and rng is not None:
            images = self.augment(images, indices, rng)
        return {"pixel_values": self.normalise(images), "labels": self.labels.index_select(0, indices)}


def split_off(train: ImageArrays, validation: int, test: ImageArrays, classes: int | None = None) -> Splits:
    """Use the last ``validation`` training images of a fixed permutation, the same for every seed, for validation."""
    if not validation:
        return Splits(train, None, test, classes)
    order = fixed_order(len(train))
    plain = ImageArrays(train.images, train.labels, mean=train.normalise.mean, std=train.normalise.std)
    return Splits(train.subset(order[:-validation]), plain.subset(order[-validation:]), test, classes)


@dataclass(frozen=True, kw_only=True)
class ImageSet(DataConfig):
    """Base of Fashion-MNIST and CIFAR-10.

    Parameters
    ----------
    data_dir
        Folder of the files, or of a folder with them of the data set's name; not given: the cache.
    validation
        Training images set aside, the last of a fixed permutation: the same for every seed.
    augment
        Random flip and crop of the training images.
    """

    data_dir: str | None = None
    validation: int = 0
    augment: FlipAndCrop = field(default_factory=FlipAndCrop)
    limit: int | None = None
    on_device: OnDevice = "auto"

    # Its name for oialr data fetch; names of its folder in data_dir; folders that may have it beside the cache.
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
        return describe(self.name).find(places)

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
            log.warning("%s holds %d images, not the %d of %s.", folder, found, wanted, self.name)
        return split_off(train, self.validation, test, self.num_labels)


@dataclass(frozen=True, kw_only=True)
class FashionMNIST(ImageSet):
    """Fashion-MNIST: 60,000 training and 10,000 test images of clothes, 28 x 28 grey (arXiv 1708.07747).

    Its files are the four .gz files, checked by sha256; after the cache, the folder of the Debian package is tried.
    """

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
        images, labels = (parse_idx(dataset.read(folder / name)) for name in names)
        return images.unsqueeze(1), labels.to(torch.int64)


@dataclass(frozen=True, kw_only=True)
class CIFAR10(ImageSet):
    """CIFAR-10: 50,000 training and 10,000 test colour images of ten classes, 32 x 32 (Krizhevsky 2009).

    Its files are those of the binary version, ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``.
    """

    name, folders = "cifar-10", ("cifar-10", "cifar-10-batches-bin")
    images = (50_000, 60_000)
    # Of each channel, as in the published runs.
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    num_channels, image_size = 3, 32

    @classmethod
    def read(cls, folder: Path, *, training: bool) -> tuple[Tensor, Tensor]:
        """Images, uint8 [N, 3, 32, 32], and labels, int64 [N]; records of a label and 3 planes."""
        dataset, parts, size = describe(cls.name), [], 1 + 3 * 32 * 32
        for name in CIFAR10_FILES[:-1] if training else CIFAR10_FILES[-1:]:
            content, damaged = dataset.read(folder / name), f"{folder / name} is damaged"
            if not content or len(content) % size:
                what = f"it has {len(content)} bytes, not a multiple of {size}, the size of a record"
                raise DataError(f"{damaged}: {what}. {dataset.fix_damage}")
            part = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, size)
            if (label := int(part[:, 0].max())) >= cls.num_labels:
                raise DataError(f"{damaged}: label {label}, but CIFAR-10 has 0 to 9. {dataset.fix_damage}")
            parts.append(part)
        records = torch.cat(parts)
        return records[:, 1:].reshape(-1, 3, 32, 32).contiguous(), records[:, 0].to(torch.int64)


def parse_idx(content: bytes) -> Tensor:
    """Gzipped IDX bytes (a header of big-endian sizes, then unsigned bytes) as a tensor of the header's shape.

    The content is not checked: its checksum has been.
    """
    data = gzip.decompress(content)
    begin = 4 + 4 * data[3]
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, begin, 4))
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=begin).view(shape)
