from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpc_oialr.data.base import CounterRNG
from hpc_oialr.data.image_arrays import _COLUMN, _FLIP, _ROW, FlipAndCrop, ImageArrays
from hpc_oialr.errors import ConfigError


def one_at_a_time(augment: FlipAndCrop, images: Tensor, samples: Tensor, rng: CounterRNG) -> Tensor:
    """The slow one: crop the padded image, then flip the crop."""
    p, results = augment.padding, []
    for image, sample in zip(images, samples.tolist(), strict=True):
        height, width = image.shape[1:]
        padded = torch.zeros(image.shape[0], height + 2 * p, width + 2 * p, dtype=image.dtype)
        padded[:, p : p + height, p : p + width] = image
        index = torch.tensor([sample])
        row = int(rng.integers(index, 2 * p + 1, stream=_ROW)[0])
        column = int(rng.integers(index, 2 * p + 1, stream=_COLUMN)[0])
        crop = padded[:, row : row + height, column : column + width]
        flip = augment.flip and int(rng.integers(index, 2, stream=_FLIP)[0])
        results.append(crop.flip(2) if flip else crop)
    return torch.stack(results)


@settings(deadline=None)
@given(
    batch=st.integers(1, 6),
    channels=st.integers(1, 3),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    flip=st.booleans(),
    padding=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_equals_one_image_at_a_time(
    batch: int, channels: int, height: int, width: int, flip: bool, padding: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)
    samples = torch.randint(0, 60_000, (batch,), generator=generator)
    augment, rng = FlipAndCrop(flip=flip, padding=padding), CounterRNG(seed, 3)
    assert torch.equal(augment(images, samples, rng), one_at_a_time(augment, images, samples, rng))


def test_off_by_default_and_both_halves_of_a_coin() -> None:
    off = ImageArrays(torch.zeros(1), torch.zeros(1), mean=0, std=1, augment=FlipAndCrop())
    assert off.augment is None
    images = torch.tensor([[0, 1]], dtype=torch.uint8).expand(200, 1, 1, 2)
    flipped = FlipAndCrop(flip=True)(images, torch.arange(200), CounterRNG(0))[:, 0, 0, 0].sum()
    assert 50 < flipped < 150


def test_negative_padding_is_named() -> None:
    with pytest.raises(ConfigError, match=r"data\.augment\.padding is -1; must be at least 0\."):
        FlipAndCrop(padding=-1)
