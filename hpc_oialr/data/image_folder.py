"""Images in folders, one folder a class: ImageNet's usual form. Read when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpc_oialr.data.base import ArrayDataset, Batch, DataConfig, Splits
from hpc_oialr.data.cache import cache_root
from hpc_oialr.data.counter_rng import SPLIT_SEED, CounterRNG
from hpc_oialr.data.image_arrays import Normalisation
from hpc_oialr.data.jpeg import read_view, require_pillow
from hpc_oialr.data.resized_crop import ResizedCrop, View, centred
from hpc_oialr.errors import ConfigError, DataError, check_interval

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's channels."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclass(frozen=True)
class Listing:
    """The image files of one part of a data set.

    Attributes
    ----------
    root
        Folder of the class folders.
    names
        Paths below it, as bytes in one array: a list of 1.3 million strings would be copied, page by
        page, into every loader process.
    labels
        Class of each, int64 [N].
    """

    root: Path
    names: NDArray[np.bytes_]
    labels: Tensor


class ImageFiles(ArrayDataset):
    """Image files that are decoded when they are gathered.

    Parameters
    ----------
    listing
        The files.
    size
        Side to which views are resized, in pixels.
    share
        Side of the square seen in the middle of an image, over its shorter side; where nothing is drawn.
    normalise
        What makes floats of the pixels.
    augment
        What to do to training images; needs the random numbers of an epoch.
    """

    def __init__(
        self,
        listing: Listing,
        size: int,
        *,
        share: float,
        normalise: Normalisation,
        augment: ResizedCrop | None = None,
    ) -> None:
        self.listing, self.size, self.share = listing, size, share
        self.normalise, self.augment = normalise, augment

    def __len__(self) -> int:
        return len(self.listing.names)

    def path(self, index: int) -> Path:
        """The file of a sample."""
        return self.listing.root / os.fsdecode(bytes(self.listing.names[index]))

    def gather(self, indices: Tensor, rng: CounterRNG | None = None) -> Batch:
        """``{"pixel_values": float32 [B, 3, size, size], "labels": int64 [B]}``.

        Raises
        ------
        SampleError
            A file is damaged; names it.
        """
        images = torch.empty(len(indices), 3, self.size, self.size, dtype=torch.uint8)
        for image, index, view in zip(images, indices.tolist(), self._views(indices, rng), strict=True):
            image.copy_(read_view(self.path(index), self.size, view))
        return {
            "pixel_values": self.normalise(images),
            "labels": self.listing.labels.index_select(0, indices),
        }

    def _views(self, indices: Tensor, rng: CounterRNG | None) -> list[Callable[[int, int], View]]:
        augment = self.augment
        if augment is None or rng is None:
            return [self._middle] * len(indices)
        return [partial(augment.view, numbers=row) for row in augment.numbers(indices, rng)]

    def _middle(self, width: int, height: int) -> View:
        side = self.share * min(width, height)
        return View(centred(width, height, side, side))


@dataclass(frozen=True, kw_only=True)
class ImageFolder(DataConfig):
    """Images in ``train/CLASS/`` and ``val/CLASS/``, and ``test/CLASS/`` if there is one; needs Pillow.

    Classes are numbered in the order of their names. Training images are random parts of the whole;
    elsewhere the middle is seen.

    Parameters
    ----------
    path
        The folder; not given: ``imagenet`` in the cache.
    size
        Side of training images, in pixels.
    evaluation_size
        Side of the others; not given: ``size``.
    evaluation_share
        Side of the middle that is seen in evaluation over the image's shorter side: 0.875 is a resize to
        256 before a crop of 224.
    augment
        Random part and flip of the training images; null = the middle.
    mean, std
        Of the channels, scaled to [0, 1]; ImageNet's.
    limit
        Use only the first so many training images of a fixed permutation.
    """

    path: str | None = None
    size: int = 224
    evaluation_size: int | None = None
    evaluation_share: float = 0.875
    augment: ResizedCrop | None = field(default_factory=ResizedCrop)
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    limit: int | None = None

    def __post_init__(self) -> None:
        self._check_limit()
        for name, value in (("size", self.size), ("evaluation_size", self.evaluation_size)):
            if value is not None and value < 1:
                raise ConfigError(f"data.{name}", value, "must be at least 1 pixel")
        check_interval("data.evaluation_share", self.evaluation_share, 0, 1, closed=(False, True))

    def folder(self) -> Path:
        """The folder that is read."""
        return cache_root() / "imagenet" if self.path is None else Path(self.path)

    def _load(self) -> Splits:
        require_pillow()
        classes = class_names(self.folder() / "train")
        train: ArrayDataset = self._part("train", classes)
        if self.limit is not None:
            # The first files are all of one class.
            train = train.subset(CounterRNG(SPLIT_SEED).permutation(len(train)))
        has_test = (self.folder() / "test").is_dir()
        test = self._part("test", classes) if has_test else None
        return Splits(train, self._part("val", classes), test, classes=len(classes))

    def _part(self, name: str, classes: list[str]) -> ImageFiles:
        training = name == "train"
        size = self.size if training else self.evaluation_size or self.size
        return ImageFiles(
            list_images(self.folder() / name, classes),
            size,
            share=self.evaluation_share,
            normalise=Normalisation(self.mean, self.std),
            augment=self.augment if training else None,
        )


def class_names(folder: Path) -> list[str]:
    """Folders of a folder, sorted.

    Raises
    ------
    DataError
        There is no such folder, or none in it.
    """
    try:
        with os.scandir(folder) as entries:
            found = sorted(entry.name for entry in entries if entry.is_dir())
    except OSError as error:
        raise DataError(
            f"image folder {folder} cannot be read: {error.strerror}. Set data.path to a folder with "
            "train/CLASS/*.jpg and val/CLASS/*.jpg; ImageNet comes from https://image-net.org."
        ) from error
    if not found:
        raise DataError(
            f"image folder {folder} has no folders of classes. Sort its images into one folder for each "
            "class; for ImageNet's validation images its development kit says which is which."
        )
    return found


def list_images(folder: Path, classes: list[str]) -> Listing:
    """Every image below the class folders of ``folder``, sorted by class and name; one scan, no file is opened.

    Raises
    ------
    DataError
        A folder is none of ``classes``, or one of its own classes has no image.
    """
    number = {name: label for label, name in enumerate(classes)}
    names: list[bytes] = []
    counts = [0] * len(classes)
    for name in class_names(folder):
        if name not in number:
            raise DataError(f"{folder / name} is a class that train/ does not have; it has {len(classes)}.")
        with os.scandir(folder / name) as entries:
            found = sorted(entry.name for entry in entries if entry.name.lower().endswith(SUFFIXES))
        if not found:
            rule = f"has no image ({', '.join(SUFFIXES)}). Fill it or remove it."
            raise DataError(f"class folder {folder / name} {rule}")
        names += [os.fsencode(f"{name}/{image}") for image in found]
        counts[number[name]] = len(found)
    labels = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor(counts))
    return Listing(folder, np.array(names), labels)
