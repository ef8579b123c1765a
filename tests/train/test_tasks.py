from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._pytree import tree_leaves

from hpc_oialr.errors import ConfigError
from hpc_oialr.lowrank.layout import local
from hpc_oialr.models import GPT2, Autoformer
from hpc_oialr.torch_compat import TorchDispatchMode
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
    assert torch.equal(task.loss(Pixels(), data, np.random.default_rng(0)), cross_entropy(logits, data["labels"]))
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


class Largest(TorchDispatchMode):
    """The largest floating-point tensor that an operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        self.numel = max([self.numel, *(x.numel() for x in made)])
        return result


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("chunk", "around"), [(7, "nothing"), (31, "DDP"), (7, "FSDP"), ("auto", "nothing")])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_a_loss_by_chunks_is_the_loss_of_all_logits(chunk, around, tied, padded, one_rank, monkeypatch):
    """Also with the head's weight padded, as on a GPU."""
    monkeypatch.setattr("hpc_oialr.train.chunked_loss.misaligned", lambda weight: padded)
    monkeypatch.setattr("hpc_oialr.train.chunked_loss.LARGE_VOCABULARY", 500)
    monkeypatch.setattr("hpc_oialr.train.chunked_loss.CHUNK_LOGITS", 3_600)
    found = []
    for setting in (None, chunk):
        torch.manual_seed(0)
        model = GPT2(dim=4, depth=1, heads=2, vocabulary=500).build({"input_ids": torch.zeros(1, 16, dtype=torch.long)})
        model = model.double()
        if not tied:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        tokens = torch.randint(0, 500, (4, 16))
        net = {"nothing": lambda m: m, "DDP": DDP, "FSDP": fully_shard}[around](model)
        data, task = {"input_ids": tokens, "labels": tokens}, LanguageModelling(loss_chunk=setting)
        with Largest() as largest:
            loss = task.loss(net, data, np.random.default_rng(0))
            loss.backward()
        with torch.no_grad():
            total = task.totals(net, data)
        found.append([loss, total, *(local(p.grad) for p in model.parameters())])
        assert vars(model.lm_head).get("forward") is None
        tokens_at_once = 64 if setting is None else 7 if setting == "auto" else setting
        columns = 512 if padded and setting is not None else 500
        assert around == "FSDP" or largest.numel == tokens_at_once * columns
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)


def test_a_number_of_tokens_needs_a_model_whose_head_gives_the_logits():
    tokens = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ConfigError, match="task.loss_chunk is 8; needs one of GPT2LMHeadModel, LlamaForCausalLM, not"):
        LanguageModelling(loss_chunk=8).totals(torch.nn.Linear(1, 1), {"input_ids": tokens, "labels": tokens})


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
    model = Autoformer(dim=16, mlp_dim=16, heads=2, lags=(1, 2), moving_average=5, label_length=6).build(data).eval()
    task = Forecasting()
    with torch.no_grad():
        totals = task.totals(model, data)
        shifted = task.totals(model, data | {"future_values": data["future_values"] + 100})
    assert totals[-1] == 18
    mse, mae = task.metrics(totals)["mse"], task.metrics(shifted)["mae"]
    assert 0 < mse < 50
    assert 90 < mae < 110
    assert task.loss(model, data, np.random.default_rng(0)).requires_grad


@pytest.mark.parametrize("variables", [None, 3])
def test_the_squared_error_is_that_of_the_metric_and_reaches_every_parameter(variables):
    torch.manual_seed(0)
    data = (
        windows()
        if variables is None
        else {
            name: value[..., None].expand(*value.shape, variables).contiguous() if value.dim() == 2 else value
            for name, value in windows().items()
        }
    )
    data["future_observed_mask"][0, 0] = 0
    settings = {"dim": 16, "mlp_dim": 16, "heads": 2, "moving_average": 5, "label_length": 6, "dropout": 0.0}
    model = Autoformer(**settings, lags=(0,), scaling="none").build(data)
    task = Forecasting(objective="mse")
    model.eval()
    loss = task.loss(model, data, np.random.default_rng(0))
    with torch.no_grad():
        assert float(loss) == pytest.approx(task.metrics(task.totals(model, data))["mse"], rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    # With lag 0 and no scaling the forecast sees the context's last value, and nothing of the future.
    with torch.no_grad():

        def forecast(**changed):
            return model(**{**data, **changed}).params[0]

        last = data["past_values"].clone()
        last[:, -1] += 1
        assert not torch.equal(forecast(past_values=last), forecast())
        assert torch.equal(forecast(future_values=data["future_values"] + 100), forecast())


def test_bad_settings():
    with pytest.raises(ConfigError, match=r"label_smoothing is 1; must lie in \[0, 1\)"):
        Classification(label_smoothing=1)
    with pytest.raises(ConfigError, match="loss_chunk is 0; must be at least 1"):
        LanguageModelling(loss_chunk=0)
    with pytest.raises(ConfigError, match="mixup is -1; must not be negative"):
        Classification(mixup=-1)
