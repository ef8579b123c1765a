"""Decode photographs with Pillow."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hpc_oialr.data.resized_crop import Box, View
from hpc_oialr.errors import MissingExtraError, SampleError

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage


def require_pillow() -> None:
    """Raise :class:`MissingExtraError` where Pillow is missing."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise MissingExtraError("Pillow", "images", purpose="reading image files") from None


def read_view(path: Path, size: int, view_of: Callable[[int, int], View]) -> Tensor:
    """A view of an image file as uint8 [3, size, size], bicubic with antialiasing.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves the view as many pixels as are wanted.

    Parameters
    ----------
    path
        A file in any format that Pillow reads.
    size
        Side of the result, in pixels.
    view_of
        The view for an image's width and height.

    Raises
    ------
    SampleError
        The file is missing, damaged or no image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            view = view_of(*image.size)
            box = _draft(image, view.box, size)
            seen = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow says SyntaxError for a broken PNG.
        raise SampleError(
            f"{path} cannot be read as an image: {error}. Copy it again from its source; without it "
            "only a new run can be started: the order of the samples depends on their number."
        ) from error
    pixels = torch.from_numpy(np.array(seen)).permute(2, 0, 1)
    return pixels.flip(2) if view.mirrored else pixels


def _draft(image: PillowImage, box: Box, size: int) -> Box:
    """Let the decoder shrink the image as far as the box allows; the box in its new pixels."""
    width, height = image.size
    left, top, right, bottom = box
    wanted = math.ceil(width * size / (right - left)), math.ceil(height * size / (bottom - top))
    image.draft("RGB", wanted)
    x, y = image.width / width, image.height / height
    return left * x, top * y, min(right * x, image.width), min(bottom * y, image.height)
