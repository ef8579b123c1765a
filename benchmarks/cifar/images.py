"""CIFAR-10 decoded once into uint8 arrays, and the batches that are cropped, flipped and normalised on the device."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpc_oialr.data import cache_root
from hpc_oialr.errors import DataError, UnknownNameError

SIDE, PADDING, CLASSES = 32, 4, 10
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Of the training images' channels, scaled to [0, 1]."""

FORM = "folders train/CLASS and test/CLASS of images, or one or two tar archives of these"
Array = NDArray[np.uint8]
Entry = tuple[str, str, bytes]  # part, class, file content


@dataclass(frozen=True)
class Size:
    """How much of the data, which ViT, and how long.

    Attributes
    ----------
    train, test, validation
        Images; ``validation`` ones are held out of the training images if that is asked for.
    dim, depth, heads, patch
        Of the vision transformer.
    """

    name: str
    train: int
    test: int
    validation: int
    dim: int
    depth: int
    heads: int
    batch: int
    epochs: float
    patch: int = 8


SIZES = {
    # The paper's mini ViT.
    "full": Size("full", 50_000, 10_000, 5_000, dim=768, depth=6, heads=6, batch=1024, epochs=40),
    # For a CPU: ten minutes of one core.
    "small": Size("small", 10_000, 5_000, 5_000, dim=192, depth=4, heads=4, batch=128, epochs=20),
    # For tests.
    "tiny": Size("tiny", 256, 100, 50, dim=32, depth=2, heads=2, batch=32, epochs=2),
}


@dataclass(frozen=True)
class Images:
    """Images uint8 [N, 3, 32, 32] and labels int64 [N] to train on and to judge by.

    Attributes
    ----------
    judge
        What ``test_images`` are: "test", or "validation" if held-out training images stand there.
    """

    size: Size
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    judge: str

    def to(self, device: torch.device) -> Images:
        """The same on a device."""
        names = ("train_images", "train_labels", "test_images", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def load(path: str | Path, size: str = "full", *, validation: bool = False, cache: Path | None = None) -> Images:
    """CIFAR-10 in one of :data:`SIZES`, decoded once.

    Parameters
    ----------
    path
        A folder that holds ``train/CLASS/*`` and ``test/CLASS/*``, or archives of them; or such an archive, whose
        other half lies beside it under the same name with train and test exchanged.
    size
        A name of :data:`SIZES`; fewer images than it names are taken as they are. Smaller sizes take the first
        images of each class.
    validation
        Judge by training images that no run trains on: for choosing settings.
    cache
        Folder for the decoded arrays; default the package's cache.

    Raises
    ------
    UnknownNameError
        If there is no such size.
    DataError
        If the path does not hold training and test images.
    """
    if size not in SIZES:
        raise UnknownNameError("size", size, SIZES)
    chosen = SIZES[size]
    parts = _cached(Path(path), cache or cache_root() / "cifar10-images")
    train, labels = (torch.from_numpy(array) for array in parts["train"])
    order = _by_class(labels)
    held = order[:0]
    if validation:
        # From the end, so that a smaller size trains on the same images with and without.
        count = min(chosen.validation, len(order) // 4)
        order, held = order[: len(order) - count], order[len(order) - count :]
    order = order[: chosen.train]
    if validation:
        judged, judged_labels = train[held], labels[held]
    else:
        test, test_labels = (torch.from_numpy(array) for array in parts["test"])
        first = _by_class(test_labels)[: chosen.test]
        judged, judged_labels = test[first], test_labels[first]
    judge = "validation" if validation else "test"
    return Images(chosen, train[order], labels[order], judged, judged_labels, judge)


def _by_class(labels: Tensor) -> Tensor:
    """Indices that take the first image of every class, then the second of every class, and so on."""
    turn = torch.zeros_like(labels)
    for label in labels.unique():
        mine = labels == label
        turn[mine] = torch.arange(int(mine.sum()))
    return torch.argsort(turn * CLASSES + labels, stable=True)


def _cached(path: Path, cache: Path) -> dict[str, tuple[Array, NDArray[np.int64]]]:
    sources = _sources(path)
    stamps = [(str(s.resolve()), s.stat().st_size, s.stat().st_mtime_ns) for s in sources]
    file = cache / f"{hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]}.npz"
    if file.exists():
        with np.load(file, allow_pickle=False) as stored:
            return {part: (stored[f"{part}_images"], stored[f"{part}_labels"]) for part in ("train", "test")}
    parts = _decode([entry for source in sources for entry in _entries(source)], path)
    named: dict[str, Any] = {
        f"{part}_{kind}": array
        for part, arrays in parts.items()
        for kind, array in zip(("images", "labels"), arrays, strict=True)
    }
    try:
        cache.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(f".{os.getpid()}.npz")
        np.savez(draft, **named)
        draft.replace(file)
    except OSError as error:
        print(f"the decoded images are not kept ({error}); each call decodes them again")
    return parts


def _sources(path: Path) -> list[Path]:
    """The folder, or the archives."""
    if not path.exists():
        raise DataError(f"{path} does not exist. Give {FORM}.")
    if path.is_dir():
        if (path / "train").is_dir() and (path / "test").is_dir():
            return [path]
        archives = sorted(p for p in path.iterdir() if ".tar" in p.name and p.is_file())
        halves = [p for p in archives if "train" in p.name or "test" in p.name]
        return _require(halves or archives, path)
    name = path.name
    other = name.replace("train", "test") if "train" in name else name.replace("test", "train")
    beside = path.with_name(other)
    return [path, beside] if other != name and beside.exists() else [path]


def _require(archives: list[Path], path: Path) -> list[Path]:
    if not archives:
        raise DataError(f"{path} holds neither. Give {FORM}.")
    return archives


def _entries(source: Path) -> Iterator[Entry]:
    if source.is_dir():
        for file in sorted(p for part in ("train", "test") for p in (source / part).glob("*/*")):
            yield file.parts[-3], file.parts[-2], file.read_bytes()
        return
    with tarfile.open(source) as archive:
        for member in archive:
            parts = Path(member.name).parts
            if member.isfile() and len(parts) >= 3 and parts[-3] in ("train", "test"):
                opened = archive.extractfile(member)
                assert opened is not None
                yield parts[-3], parts[-2], opened.read()


def _decode(entries: list[Entry], path: Path) -> dict[str, tuple[Array, NDArray[np.int64]]]:
    """Pixels of every image; pillow decodes without Python's lock, so threads do."""
    classes = sorted({label for _, label, _ in entries})
    with ThreadPoolExecutor() as pool:
        pixels = list(pool.map(_pixels, (content for _, _, content in entries), chunksize=256))
    parts = {}
    for part in ("train", "test"):
        mine = [i for i, entry in enumerate(entries) if entry[0] == part]
        if not mine:
            raise DataError(f"{path} holds no {part} images. Give {FORM}.")
        labels = np.array([classes.index(entries[i][1]) for i in mine], dtype=np.int64)
        parts[part] = (np.stack([pixels[i] for i in mine]), labels)
    return parts


def _pixels(content: bytes) -> Array:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        return np.ascontiguousarray(np.asarray(image.convert("RGB"), dtype=np.uint8).transpose(2, 0, 1))


class Batches:
    """Random batches of the training images, made on the device; no transfer and no wait for it in a step.

    Parameters
    ----------
    images
        Already on the device.
    batch
        Images in a batch; what is left at the end of an epoch is dropped, so every batch has one shape.
    seed
        Of order, crops and flips.
    """

    def __init__(self, images: Images, batch: int, seed: int) -> None:
        self.images, self.batch = images, batch
        device = images.train_images.device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._axis = torch.arange(SIDE, device=device)
        self._channels = torch.arange(3, device=device)[None, :, None, None]
        self.steps_an_epoch = max(1, len(images.train_images) // batch)

    def epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images float32 [B, 3, 32, 32] and labels int64 [B]."""
        count, device = len(self.images.train_images), self.images.train_images.device
        order = torch.randperm(count, generator=self._generator, device=device)
        offsets = torch.randint(0, 2 * PADDING + 1, (count, 2), generator=self._generator, device=device)
        flips = torch.rand(count, generator=self._generator, device=device) < 0.5
        for i in range(self.steps_an_epoch):
            chosen = order[i * self.batch : (i + 1) * self.batch]
            yield self._crop(chosen, offsets[chosen], flips[chosen]), self.images.train_labels[chosen]

    def _crop(self, chosen: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(self.images.train_images[chosen], (PADDING,) * 4)
        rows = offsets[:, :1] + self._axis
        columns = offsets[:, 1:] + torch.where(flips[:, None], self._axis.flip(0), self._axis)
        samples = torch.arange(len(chosen), device=chosen.device)[:, None, None, None]
        return normalised(padded[samples, self._channels, rows[:, None, :, None], columns[:, None, None, :]])


def normalised(images: Tensor) -> Tensor:
    """Float32 of zero mean and unit variance a channel."""
    mean, deviation = _statistics(images.device)
    return (images.float() / 255 - mean) / deviation


@functools.cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    # Made once: a tensor from Python numbers is a copy to the device, which a GPU's step would wait for.
    mean, deviation = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    return mean, deviation
