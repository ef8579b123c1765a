"""Images in one folder per class, as in ImageNet; read on demand by Pillow."""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpc_oialr.data.base import ArrayDataset, Batch, CounterRNG, DataConfig, Splits, fixed_order
from hpc_oialr.data.fetch import cache_root
from hpc_oialr.data.image_arrays import Normalisation
from hpc_oialr.errors import ConfigError, DataError, MissingExtraError, SampleError, check_interval

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

# Of ImageNet's channels.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
ATTEMPTS = 10
# Random numbers of a view: flip, column, row, then area and aspect of each attempt; stream 0 is the order.
_STREAMS = range(1, 4 + 2 * ATTEMPTS)

# Left, top, right and bottom, in pixels.
Box = tuple[float, float, float, float]


class View(NamedTuple):
    """The part of an image to take, and whether it is flipped left and right."""

    box: Box
    mirrored: bool = False


@dataclass(frozen=True, kw_only=True)
class ResizedCrop:
    """A part of random area and aspect at a random place, flipped half of the time. arXiv 1409.4842.

    Parameters
    ----------
    scale
        Least and largest share of the image's area.
    ratio
        Least and largest width over height, drawn evenly on a logarithmic scale.
    flip
        Flip left and right with probability 1/2.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: bool = True

    def __post_init__(self) -> None:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high:
                rule = "must be two positive numbers, the smaller one first"
                raise ConfigError(f"data.augment.{name}", (low, high), rule)
        check_interval("data.augment.scale", self.scale[1], 0, 1, closed=(False, True))

    def numbers(self, samples: Tensor, rng: CounterRNG) -> Tensor:
        """Random numbers in [0, 1) for :meth:`view`, a row for each of ``samples`` (int64 [B])."""
        return torch.stack([rng.uniform(samples, stream=stream) for stream in _STREAMS], dim=1)

    def view(self, width: int, height: int, numbers: Tensor) -> View:
        """The view of one image, from its row of random numbers.

        If no attempt fits into the image, the largest part around its centre of an allowed aspect.
        """
        flip, across, down = numbers[:3].tolist()
        mirrored = self.flip and flip < 0.5
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for area, aspect in numbers[3:].reshape(ATTEMPTS, 2).tolist():
            pixels = width * height * (self.scale[0] + (self.scale[1] - self.scale[0]) * area)
            ratio = math.exp(low + (high - low) * aspect)
            w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(across * (width - w + 1)), int(down * (height - h + 1))
                return View((left, top, left + w, top + h), mirrored)
        aspect = min(max(width / height, self.ratio[0]), self.ratio[1])
        box = _centred(width, height, min(width, height * aspect), min(height, width / aspect))
        return View(box, mirrored)


def _centred(width: int, height: int, w: float, h: float) -> Box:
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def read_view(
    file: Path | BinaryIO, size: int, view_of: Callable[[int, int], View], *, name: str | None = None
) -> Tensor:
    """A view of an encoded image as uint8 [3, size, size], bicubic with antialiasing.

    ``view_of`` chooses it by width and height; ``name`` is what an error calls it, by default the path. Raises
    :class:`SampleError` if the file is missing or damaged.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            view = view_of(*image.size)
            box = _draft(image, view.box, size)
            seen = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow says SyntaxError for a broken PNG.
        fix = "Copy it again from its source; without it only a new run can be started"
        why = "the order of the samples depends on their number"
        raise SampleError(f"{name or file} cannot be read as an image: {error}. {fix}: {why}.") from error
    pixels = torch.from_numpy(np.ascontiguousarray(np.asarray(seen).transpose(2, 0, 1)))
    return pixels.flip(2) if view.mirrored else pixels


def _draft(image: PillowImage, box: Box, size: int) -> Box:
    """Let the JPEG decoder halve the image while the box keeps ``size`` pixels; returns the box in new pixels."""
    width, height = image.size
    left, top, right, bottom = box
    image.draft("RGB", (math.ceil(width * size / (right - left)), math.ceil(height * size / (bottom - top))))
    x, y = image.width / width, image.height / height
    return left * x, top * y, min(right * x, image.width), min(bottom * y, image.height)


def require_pillow() -> None:
    """Raise :class:`MissingExtraError` where Pillow is missing."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise MissingExtraError("Pillow", "images", purpose="reading image files") from None


class EncodedImages(ArrayDataset):
    """Images that are decoded in :meth:`gather`; a subclass says where each is."""

    def __init__(self, labels: Tensor, config: ImageConfig, *, training: bool) -> None:
        self.labels = labels
        self.size = config.size if training else config.evaluation_size or config.size
        self.share, self.augment = config.evaluation_share, config.augment if training else None
        self.normalise = Normalisation(config.mean, config.std)

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def encoded(self, index: int) -> tuple[Path | BinaryIO, str]:
        """File of a sample, and its name for errors."""

    def gather(self, indices: Tensor, rng: CounterRNG | None = None) -> Batch:
        """``{"pixel_values": uint8 [B, 3, size, size], "labels": int64 [B]}``; a damaged file is a SampleError."""
        views: list[Callable[[int, int], View]] = [self.middle] * len(indices)
        if self.augment is not None and rng is not None:
            views = [partial(self.augment.view, numbers=row) for row in self.augment.numbers(indices, rng)]
        images = torch.empty(len(indices), 3, self.size, self.size, dtype=torch.uint8)
        for image, index, view in zip(images, indices.tolist(), views, strict=True):
            file, name = self.encoded(index)
            image.copy_(read_view(file, self.size, view, name=name))
        return {"pixel_values": images, "labels": self.labels.index_select(0, indices)}

    def finish(self, batch: Batch) -> Batch:
        """Pixels as float32 of mean 0 and standard deviation 1: four times the bytes."""
        return batch | {"pixel_values": self.normalise(batch["pixel_values"])}

    def middle(self, width: int, height: int) -> View:
        """The view for evaluation."""
        side = self.share * min(width, height)
        return View(_centred(width, height, side, side))


class ImageFiles(EncodedImages):
    """Image files below ``root``.

    Names are bytes in one array: a list of 1.3 million strings would be copied, page by page, into every worker.
    """

    def __init__(
        self, root: Path, names: NDArray[np.bytes_], labels: Tensor, config: ImageConfig, *, training: bool
    ) -> None:
        super().__init__(labels, config, training=training)
        self.root, self.names = root, names

    def path(self, index: int) -> Path:
        """The file of a sample."""
        return self.root / os.fsdecode(bytes(self.names[index]))

    def encoded(self, index: int) -> tuple[Path, str]:
        """The file of a sample, twice."""
        path = self.path(index)
        return path, str(path)


@dataclass(frozen=True, kw_only=True)
class ImageConfig(DataConfig):
    """Base of image folders and shards: training takes random parts of images, evaluation the middle; needs Pillow.

    Parameters
    ----------
    size, evaluation_size
        Side of training images and of the others, in pixels; the latter not given: the same.
    evaluation_share
        Side of the middle used in evaluation over the image's shorter side: 0.875 is a resize to 256 before a
        crop of 224.
    augment
        Random part and flip of the training images; null = the middle.
    mean, std
        Of the channels, scaled to [0, 1]; ImageNet's.
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
        super().__post_init__()
        for name, value in (("size", self.size), ("evaluation_size", self.evaluation_size)):
            if value is not None and value < 1:
                raise ConfigError(f"data.{name}", value, "must be at least 1 pixel")
        check_interval("data.evaluation_share", self.evaluation_share, 0, 1, closed=(False, True))


@dataclass(frozen=True, kw_only=True)
class ImageFolder(ImageConfig):
    """Images in ``train/CLASS/`` and ``val/CLASS/``, and ``test/CLASS/`` if there is one.

    Classes are numbered in the order of their names. Further parameters: see :class:`ImageConfig`.

    Parameters
    ----------
    path
        The folder; not given: ``imagenet`` in the cache.
    """

    def _load(self) -> Splits:
        require_pillow()
        folder = cache_root() / "imagenet" if self.path is None else Path(self.path)
        classes = class_names(folder / "train")

        def part(name: str) -> ImageFiles:
            listed = list_images(folder / name, classes)
            return ImageFiles(folder / name, *listed, self, training=name == "train")

        train: ArrayDataset = part("train")
        if self.limit is not None:
            # The first of a fixed permutation: the first files are all of one class.
            train = train.subset(fixed_order(len(train)))
        test = part("test") if (folder / "test").is_dir() else None
        return Splits(train, part("val"), test, classes=len(classes))


def class_names(folder: Path) -> list[str]:
    """Folders of a folder, sorted; :class:`DataError` if there is none."""
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


def list_images(folder: Path, classes: list[str]) -> tuple[NDArray[np.bytes_], Tensor]:
    """Names below ``folder`` and labels of all images, sorted by class and name; one scan, no file is opened."""
    names: list[bytes] = []
    labels: list[int] = []
    for name in class_names(folder):
        if name not in classes:
            raise DataError(f"{folder / name} is a class that train/ does not have; it has {len(classes)}.")
        with os.scandir(folder / name) as entries:
            found = sorted(entry.name for entry in entries if entry.name.lower().endswith(SUFFIXES))
        if not found:
            rule = f"has no image ({', '.join(SUFFIXES)}). Fill it or remove it."
            raise DataError(f"class folder {folder / name} {rule}")
        names += [os.fsencode(f"{name}/{image}") for image in found]
        labels += [classes.index(name)] * len(found)
    return np.array(names), torch.tensor(labels)
