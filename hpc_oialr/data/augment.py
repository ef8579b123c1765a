"""Random flip and crop of images, the same for any number of processes and after a resume."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hpc_oialr.data.counter_rng import CounterRNG
from hpc_oialr.errors import ConfigError

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

    @property
    def active(self) -> bool:
        """Whether anything is done."""
        return self.flip or self.padding > 0

    def __call__(self, images: Tensor, samples: Tensor, rng: CounterRNG) -> Tensor:
        """Augment a batch, each image by its own random numbers.

        Parameters
        ----------
        images
            Any dtype [B, C, H, W].
        samples
            Positions of the images in the data set, int64 [B].
        rng
            Seed and epoch.
        """
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
