"""Images in memory as bytes, with random flips and crops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hpc_oialr.data.base import ArrayDataset, Batch, Splits
from hpc_oialr.data.counter_rng import SPLIT_SEED, CounterRNG
from hpc_oialr.errors import ConfigError

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
        """Augment images [B, C, H, W], each by the random numbers of its position in ``samples``, int64 [B]."""
        batch, channels, height, width = images.shape
        span = 2 * self.padding + 1
        rows = torch.arange(height) + rng.integers(samples, span, stream=_ROW)[:, None]
        columns = torch.arange(width).expand(batch, -1)
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
        self._factor, self._shift = (1 / (255 * s)).float(), (-m / s).float()

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] as float32."""
        return images.to(torch.float32).mul_(self._factor).add_(self._shift)


class ImageArrays(ArrayDataset):
    """Images kept as bytes (uint8 [N, C, H, W]), turned into normalised floats a batch at a time."""

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
        images = self.images.index_select(0, indices)
        if self.augment is not None and rng is not None:
            images = self.augment(images, indices, rng)
        return {"pixel_values": self.normalise(images), "labels": self.labels.index_select(0, indices)}


def split_off(train: ImageArrays, validation: int, test: ImageArrays, classes: int | None = None) -> Splits:
    """Set aside the last ``validation`` training images of a fixed permutation: the same for every seed."""
    if not validation:
        return Splits(train, None, test, classes)
    order = CounterRNG(SPLIT_SEED).permutation(len(train))
    plain = ImageArrays(train.images, train.labels, mean=train.normalise.mean, std=train.normalise.std)
    return Splits(train.subset(order[:-validation]), plain.subset(order[-validation:]), test, classes)
