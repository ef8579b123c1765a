"""A random part of a photograph, resized: the same for any number of processes and after a resume."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_oialr.data.counter_rng import CounterRNG
from hpc_oialr.errors import ConfigError, check_interval

_ATTEMPTS = 10
_STREAMS = range(
    1, 4 + 2 * _ATTEMPTS
)  # flip, column, row, then area and aspect of each attempt; 0 is the order


Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""


@dataclass(frozen=True)
class View:
    """What is seen of an image.

    Attributes
    ----------
    box
        Its part.
    mirrored
        Whether left and right are exchanged afterwards.
    """

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
        """Random numbers in [0, 1) that :meth:`view` takes, a row for each of ``samples`` (int64 [B])."""
        return torch.stack([rng.uniform(samples, stream=stream) for stream in _STREAMS], dim=1)

    def view(self, width: int, height: int, numbers: Tensor) -> View:
        """The view of one image, from its row of random numbers.

        Where no attempt fits into the image, the largest part around its centre of an allowed aspect.
        """
        flip, across, down = numbers[:3].tolist()
        mirrored = self.flip and flip < 0.5
        for area, aspect in numbers[3:].reshape(_ATTEMPTS, 2).tolist():
            w, h = self._sides(width * height, area, aspect)
            if 0 < w <= width and 0 < h <= height:
                left, top = int(across * (width - w + 1)), int(down * (height - h + 1))
                return View((left, top, left + w, top + h), mirrored)
        aspect = min(max(width / height, self.ratio[0]), self.ratio[1])
        return View(
            centred(width, height, min(width, height * aspect), min(height, width / aspect)), mirrored
        )

    def _sides(self, whole: int, area: float, aspect: float) -> tuple[int, int]:
        """Width and height for two numbers in [0, 1)."""
        pixels = whole * (self.scale[0] + (self.scale[1] - self.scale[0]) * area)
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = math.exp(low + (high - low) * aspect)
        return round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))


def centred(width: int, height: int, w: float, h: float) -> Box:
    """The box of w x h pixels in the middle of an image.

    Examples
    --------
    >>> centred(100, 60, 40, 40)
    (30.0, 10.0, 70.0, 50.0)
    """
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h
