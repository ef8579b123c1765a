"""Small image files whose pixels tell where they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def ramp(width: int, height: int) -> Image.Image:
    """Red grows by 0.4 a pixel from left to right, green by 0.4 from top to bottom."""
    pixels = np.zeros((height, width, 3), dtype=np.float64)
    pixels[..., 0] = 0.4 * np.arange(width)
    pixels[..., 1] = 0.4 * np.arange(height)[:, None]
    return Image.fromarray(pixels.round().astype(np.uint8))


def write_image_folder(folder: Path, *, train: int = 8, val: int = 4, classes: int = 2) -> Path:
    """JPEGs of 40 x 30 or 30 x 40 pixels of noise, so many for each class."""
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for label in range(classes):
            target = folder / part / f"class_{label}"
            target.mkdir(parents=True)
            for i in range(count):
                shape = (30, 40, 3) if i % 2 else (40, 30, 3)
                pixels = generator.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(target / f"{i}.JPEG")
    return folder
