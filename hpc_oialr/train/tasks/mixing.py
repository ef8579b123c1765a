"""Mixup and CutMix of images within a batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def mixup(pixels: Tensor, generator: np.random.Generator, alpha: float) -> tuple[Tensor, float]:
    """``lam x + (1 - lam) x'`` with lam from Beta(alpha, alpha). arXiv 1710.09412.

    The partner x' is the same batch in reverse order.

    Parameters
    ----------
    pixels
        B x C x H x W.

    Returns
    -------
    The mixed images and lam.
    """
    lam = float(generator.beta(alpha, alpha))
    return torch.lerp(pixels.flip(0), pixels, lam), lam


def cutmix(pixels: Tensor, generator: np.random.Generator, alpha: float) -> tuple[Tensor, float]:
    """A rectangle of about 1 - lam of the area comes from the partner. arXiv 1905.04899.

    Parameters
    ----------
    pixels
        B x C x H x W.

    Returns
    -------
    The mixed images and the share of the area that is their own.
    """
    height, width = pixels.shape[-2:]
    side = (1 - float(generator.beta(alpha, alpha))) ** 0.5
    top, bottom = _span(height, side, generator)
    left, right = _span(width, side, generator)
    mixed = pixels.clone()
    mixed[..., top:bottom, left:right] = pixels.flip(0)[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _span(size: int, share: float, generator: np.random.Generator) -> tuple[int, int]:
    """An interval of about ``share`` of ``size`` around a random centre, cut at the borders."""
    centre, half = int(generator.integers(size)), round(share * size / 2)
    return max(0, centre - half), min(size, centre + half)
