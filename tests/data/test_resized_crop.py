from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_oialr.data import ResizedCrop
from hpc_oialr.data.base import CounterRNG
from hpc_oialr.errors import ConfigError


@settings(deadline=None)
@given(width=st.integers(1, 700), height=st.integers(1, 700), seed=st.integers(0, 99))
def test_views_lie_within_the_image_and_have_an_allowed_form(width: int, height: int, seed: int) -> None:
    crop = ResizedCrop(scale=(0.2, 0.6), ratio=(0.5, 2.0))
    for row in crop.numbers(torch.arange(4), CounterRNG(seed)):
        left, top, right, bottom = crop.view(width, height, row).box
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        if min(width, height) > 50:
            share = (right - left) * (bottom - top) / (width * height)
            aspect = (right - left) / (bottom - top)
            fallback = not (0.18 < share < 0.63)
            assert 0.48 < aspect < 2.1
            assert not fallback or (left + right, top + bottom) == (width, height)


def test_area_aspect_place_and_flip_are_spread_as_said() -> None:
    crop = ResizedCrop()
    views = [crop.view(500, 400, row) for row in crop.numbers(torch.arange(4000), CounterRNG(7))]
    boxes = np.array([view.box for view in views])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert np.mean([view.mirrored for view in views]) == pytest.approx(0.5, abs=0.03)
    # Where everything fits, area is even over the scale and aspect even on a logarithmic scale.
    small = w * h < 0.5 * 500 * 400
    assert np.mean(w[small] * h[small] / (500 * 400)) == pytest.approx((0.08 + 0.5) / 2, abs=0.02)
    assert np.mean(np.log(w[small] / h[small])) == pytest.approx(0, abs=0.02)
    assert np.mean(boxes[small, 0] / (500 - w[small] + 1)) == pytest.approx(0.5, abs=0.02)


def test_a_view_is_a_function_of_seed_epoch_and_sample() -> None:
    crop = ResizedCrop()
    numbers = crop.numbers(torch.tensor([3, 5, 9]), CounterRNG(1, 2))
    assert np.array_equal(crop.numbers(torch.tensor([5]), CounterRNG(1, 2))[0], numbers[1])
    for other in (CounterRNG(2, 2), CounterRNG(1, 3)):
        assert not np.array_equal(crop.numbers(torch.tensor([5]), other)[0], numbers[1])


def test_what_does_not_fit_is_the_middle() -> None:
    crop = ResizedCrop(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False)
    row = crop.numbers(torch.arange(1), CounterRNG(0))[0]
    assert crop.view(300, 100, row).box == (100, 0, 200, 100)
    assert crop.view(100, 100, row).box == (0, 0, 100, 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (0.5, 0.1)}, r"data.augment.scale is \(0.5, 0.1\); must be two positive numbers"),
        ({"scale": (0.5, 1.5)}, r"data.augment.scale is 1.5; must lie in \(0, 1\]"),
        ({"ratio": (0.0, 1.0)}, r"data.augment.ratio is \(0.0, 1.0\); must be two positive numbers"),
    ],
)
def test_bad_settings(options: dict[str, tuple[float, float]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ResizedCrop(**options)
