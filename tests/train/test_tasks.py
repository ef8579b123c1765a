from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from hpc_oialr.errors import ConfigError
from hpc_oialr.models import Autoformer
from hpc_oialr.train.tasks import Classification, Forecasting, LanguageModelling, cutmix, mixup


class Pixels(torch.nn.Module):
    """Logits are the first pixels."""

    def forward(self, pixel_values):
        return SimpleNamespace(logits=pixel_values.flatten(1)[:, :3])


def batch(n=8):
    return {"pixel_values": torch.randn(n, 1, 4, 4), "labels": torch.randint(0, 3, (n,))}


def test_classification_loss_and_metrics():
    data, task = batch(), Classification()
    logits = data["pixel_values"].flatten(1)[:, :3]
    assert torch.equal(
        task.loss(Pixels(), data, np.random.default_rng(0)), cross_entropy(logits, data["labels"])
    )
    metrics = task.metrics(task.totals(Pixels(), data) + task.totals(Pixels(), data))
    assert metrics["accuracy"] == (logits.argmax(1) == data["labels"]).double().mean()
    assert metrics["loss"] == pytest.approx(float(cross_entropy(logits, data["labels"])))


def test_mixing_is_a_function_of_the_moment():
    task, data = Classification(mixup=0.4, cutmix=1.0), batch()
    one, again, other = (task.loss(Pixels(), data, np.random.default_rng(step)) for step in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_mixup_is_the_mean_of_both():
    pixels = torch.randn(6, 1, 4, 4)
    mixed, lam = mixup(pixels, np.random.default_rng(0), 1.0)
    torch.testing.assert_close(mixed, lam * pixels + (1 - lam) * pixels.flip(0))


def test_cutmix_share_is_what_is_left():
    pixels = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    for seed in range(20):
        mixed, own = cutmix(pixels, np.random.default_rng(seed), 1.0)
        assert float((mixed[0] == 0).double().mean()) == pytest.approx(own)


def test_language_model_is_judged_in_bits():
    class Uniform(torch.nn.Module):
        def forward(self, input_ids):
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 256))

    task, tokens = LanguageModelling(), torch.randint(0, 256, (2, 9))
    data = {"input_ids": tokens, "labels": tokens}
    metrics = task.metrics(task.totals(Uniform(), data))
    assert metrics["bits_per_byte"] == pytest.approx(8)
    assert metrics["perplexity"] == pytest.approx(256, rel=1e-5)
    assert float(task.loss(Uniform(), data, np.random.default_rng(0))) == pytest.approx(8 * math.log(2))
    assert task.count(data) == 18


def windows(n=3, past=20, future=6):
    return {
        "past_values": torch.randn(n, past),
        "past_observed_mask": torch.ones(n, past),
        "past_time_features": torch.randn(n, past, 2),
        "future_values": torch.randn(n, future),
        "future_observed_mask": torch.ones(n, future),
        "future_time_features": torch.randn(n, future, 2),
    }


def test_forecasts_do_not_see_the_future():
    torch.manual_seed(0)
    data = windows()
    model = (
        Autoformer(dim=16, mlp_dim=16, heads=2, lags=(1, 2), moving_average=5, label_length=6)
        .build(data)
        .eval()
    )
    task = Forecasting()
    with torch.no_grad():
        totals = task.totals(model, data)
        shifted = task.totals(model, data | {"future_values": data["future_values"] + 100})
    assert totals[-1] == 18
    mse, mae = task.metrics(totals)["mse"], task.metrics(shifted)["mae"]
    assert 0 < mse < 50
    assert 90 < mae < 110
    assert task.loss(model, data, np.random.default_rng(0)).requires_grad


def test_bad_settings():
    with pytest.raises(ConfigError, match=r"label_smoothing is 1; must lie in \[0, 1\)"):
        Classification(label_smoothing=1)
    with pytest.raises(ConfigError, match="mixup is -1; must not be negative"):
        Classification(mixup=-1)
