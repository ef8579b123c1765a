from __future__ import annotations

import pytest
import torch

from hpc_oialr.errors import ConfigError
from hpc_oialr.models import GPT2, Autoformer, ResNet, ViT

IMAGES = {"pixel_values": torch.randn(2, 1, 28, 28), "labels": torch.zeros(2, dtype=torch.int64)}
TEXT = {"input_ids": torch.zeros(2, 12, dtype=torch.int64)}
SMALL_VIT = {
    "image_size": 28,
    "patch_size": 7,
    "channels": 1,
    "dim": 16,
    "depth": 1,
    "heads": 2,
    "classes": 10,
}
SMALL_RESNET = {
    "image_size": 56,
    "channels": 1,
    "stem": 8,
    "dims": (8, 16, 32),
    "depths": (1, 1, 1),
    "classes": 10,
}


def test_vit():
    model = ViT(**SMALL_VIT).build(IMAGES)
    assert model(pixel_values=IMAGES["pixel_values"]).logits.shape == (2, 10)
    assert model.config._attn_implementation == "sdpa"


def test_resnet_keeps_a_sensible_resolution():
    model = ResNet(**SMALL_RESNET, block="basic").build(IMAGES)
    states = model(pixel_values=IMAGES["pixel_values"], output_hidden_states=True).hidden_states
    assert [state.shape[-1] for state in states] == [14, 14, 7, 4]


def test_gpt2_takes_its_context_from_the_data():
    model = GPT2(dim=16, depth=1, heads=2).build(TEXT)
    assert model(input_ids=TEXT["input_ids"]).logits.shape == (2, 12, 256)
    assert model.config.n_positions == 12


def test_same_seed_same_weights():
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        weights.append(ViT(**SMALL_VIT).build(IMAGES).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ViT(image_size=28, patch_size=5), "image_size is 28; must be a multiple of patch_size = 5"),
        (lambda: ViT(dim=10, heads=3), "dim is 10; must be a multiple of heads = 3"),
        (lambda: ViT(dropout=1.0), r"dropout is 1.0; must lie in \[0, 1\)"),
        (lambda: ViT(depth=0), "depth is 0; must be at least 1"),
        (lambda: ResNet(dims=(1,), depths=(1, 2)), "must have one entry for each of depths"),
        (lambda: Autoformer(moving_average=4), "moving_average is 4; must be odd"),
        (lambda: Autoformer(lags=()), "lags is .*; must hold at least one"),
        (lambda: ViT(**SMALL_VIT).build(TEXT), "needs batches with 'pixel_values'; the data give input_ids"),
        (
            lambda: ViT(**{**SMALL_VIT, "image_size": 14}).build(IMAGES),
            r"image_size is 14; must be the side of the data",
        ),
        (lambda: ResNet(channels=3).build(IMAGES), "channels is 3; must equal the data's, which have 1"),
    ],
)
def test_settings_that_do_not_fit(make, text):
    with pytest.raises(ConfigError, match=text):
        make()
