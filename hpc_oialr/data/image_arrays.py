"""Images in memory as bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpc_oialr.data.augment import FlipAndCrop
from hpc_oialr.data.base import ArrayDataset, Batch, Splits
from hpc_oialr.data.counter_rng import SPLIT_SEED, CounterRNG

Values = float | Sequence[float]


class Normalisation:
    """Pixels of 0 to 255 as floats of mean 0 and standard deviation 1.

    Parameters
    ----------
    mean, std
        Of the pixels, scaled to [0, 1]: one number, or one for each channel.
    """

    def __init__(self, mean: Values, std: Values) -> None:
        self.mean, self.std = mean, std
        self._factor = (1 / (255 * _column(std))).float()
        self._shift = (-_column(mean) / _column(std)).float()

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] as float32."""
        return images.to(torch.float32).mul_(self._factor).add_(self._shift)


def _column(values: Values) -> Tensor:
    """float64 [C or 1, 1, 1]."""
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1)


class ImageArrays(ArrayDataset):
    """Images kept as bytes, turned into normalised floats a batch at a time.

    Parameters
    ----------
    images
        uint8 [N, C, H, W].
    labels
        int64 [N].
    mean, std
        Of the pixels, scaled to [0, 1]: one number, or one for each channel.
    augment
        What to do to training images; needs the random numbers of an epoch.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mean: Values,
        std: Values,
        augment: FlipAndCrop | None = None,
    ) -> None:
        self.images, self.labels = images, labels
        self.normalise = Normalisation(mean, std)
        self.augment = augment if augment is not None and augment.active else None

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, indices: Tensor, rng: CounterRNG | None = None) -> Batch:
        """``{"pixel_values": float32 [B, C, H, W], "labels": int64 [B]}``."""
        images = self.images.index_select(0, indices)
        if self.augment is not None and rng is not None:
            images = self.augment(images, indices, rng)
        return {"pixel_values": self.normalise(images), "labels": self.labels.index_select(0, indices)}


def split_off(train: ImageArrays, validation: int, test: ImageArrays) -> Splits:
    """Set aside the last ``validation`` training images of a fixed permutation: the same for every seed."""
    if not validation:
        return Splits(train, None, test)
    order = CounterRNG(SPLIT_SEED).permutation(len(train))
    plain = ImageArrays(train.images, train.labels, mean=train.normalise.mean, std=train.normalise.std)
    return Splits(train.subset(order[:-validation]), plain.subset(order[-validation:]), test)
