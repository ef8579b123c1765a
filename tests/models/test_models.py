from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hpc_oialr.errors import ConfigError
from hpc_oialr.models import GPT2, Autoformer, Llama, ResNet, ViT
from hpc_oialr.models.autoformer import aggregate
from hpc_oialr.train.tasks import Forecasting

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


def test_resnet_keeps_a_sensible_resolution():
    model = ResNet(**SMALL_RESNET, block="basic").build(IMAGES)
    states = model(pixel_values=IMAGES["pixel_values"], output_hidden_states=True).hidden_states
    assert [state.shape[-1] for state in states] == [14, 14, 7, 4]


def test_gpt2_takes_its_context_from_the_data():
    model = GPT2(dim=16, depth=1, heads=2).build(TEXT)
    assert model(input_ids=TEXT["input_ids"]).logits.shape == (2, 12, 256)
    assert model.config.n_positions == 12


@pytest.mark.parametrize("model", ["ViT", "GPT2"])
def test_attention_is_given_no_mask_even_while_a_cuda_graph_is_captured(model, monkeypatch):
    """transformers 5.17 builds masks then, with which attention leaves its fast kernels."""
    torch.manual_seed(0)
    config, batch = {"ViT": (ViT(**SMALL_VIT), IMAGES), "GPT2": (GPT2(dim=16, depth=1, heads=2), TEXT)}[model]
    built, given = config.build(batch), []
    attend = torch.nn.functional.scaled_dot_product_attention

    def noted(*args, attn_mask=None, is_causal=False, **rest):
        given.append((attn_mask, is_causal))
        return attend(*args, attn_mask=attn_mask, is_causal=is_causal, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = built(**inputs).logits
    assert given == [(None, model == "GPT2")]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    built.set_attn_implementation("sdpa")
    assert torch.equal(logits, built(**inputs).logits)


def test_llama():
    """Context by the data; fewer heads of keys and values; the head is the embedding."""
    settings = {"dim": 16, "depth": 2, "heads": 4, "mlp_dim": 24, "vocabulary": 50}
    model = Llama(**settings, key_value_heads=2).build(TEXT)
    assert model(input_ids=TEXT["input_ids"]).logits.shape == (2, 12, 50)
    assert model.config.max_position_embeddings == 12
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (8, 16)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_autoformer_starts_with_the_decoders_own_forecast():
    """As published: the trend's and the season's values, added up, and nothing else."""
    torch.manual_seed(0)
    past, future = torch.randn(2, 14, 3), torch.randn(2, 4, 3)
    batch = {"past_values": past, "past_time_features": torch.randn(2, 14, 5), "future_values": future}
    settings = {"dim": 16, "mlp_dim": 16, "heads": 2, "moving_average": 5, "label_length": 6, "scaling": "none"}
    batch |= {"future_time_features": torch.randn(2, 4, 5), "past_observed_mask": torch.ones_like(past)}
    for lags in ((0,), (0, 2)):
        model = Autoformer(**settings, lags=lags, initial="published").build(batch).eval()
        with torch.no_grad():
            decoded = model.model(**batch)
            values = (decoded.last_hidden_state + decoded.trend)[:, -4:, : 3 * len(lags) : len(lags)]
            torch.testing.assert_close(model(**batch).params[0], values)
        embedding = model.model.encoder.value_embedding.value_projection.weight.detach()
        assert float(embedding.std()) == pytest.approx((2 / embedding.shape[1]) ** 0.5, rel=0.2)


def forecasts(seed=0, samples=5, past=16, future=12, **settings):
    """An Autoformer, its batch, and transformers' own of the same weights."""
    torch.manual_seed(seed)
    small = {"dim": 16, "mlp_dim": 16, "heads": 4, "moving_average": 5, "label_length": 8, "scaling": "none"}
    values = torch.randn(samples, past, 3)
    batch = {"past_values": values, "past_time_features": torch.randn(samples, past, 2)}
    batch |= {"future_values": torch.randn(samples, future, 3), "future_time_features": torch.randn(samples, future, 2)}
    batch |= {"past_observed_mask": torch.ones_like(values)}
    model = Autoformer(**small, lags=(0,), dropout=0.0).build(batch)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    stock = Autoformer(**small, lags=(0,), dropout=0.0, attention="transformers").build(batch)
    stock.load_state_dict(model.state_dict())
    return model, stock, batch


@pytest.mark.parametrize("training", [True, False])
def test_autoformers_attention_is_that_of_transformers_for_one_sample(training):
    """Also its gradients; with no more steps to decode than to encode, as transformers cuts longer queries."""
    model, stock, batch = forecasts(samples=1, future=8)
    gradients = []
    for each in (model.train(training), stock.train(training)):
        each(**batch).params[0].square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None]))
    torch.testing.assert_close(model(**batch).params[0], stock(**batch).params[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4 * float(gradients[1].norm()))


def test_autoformers_attention_by_its_definition():
    """Values rolled by the largest correlations' delays; keys and values filled with zeros to the query's length."""
    torch.manual_seed(0)
    q, k, v, count = torch.randn(3, 10, 4), torch.randn(3, 6, 4), torch.randn(3, 6, 4), 2
    filled = [torch.nn.functional.pad(x, (0, 0, 0, 4)) for x in (k, v)]
    delays = range(10)
    correlation = torch.stack([(q * filled[0].roll(tau, 1)).sum(1).mean(1) for tau in delays], dim=1)
    for shared in (True, False):
        judged = correlation.mean(0).expand_as(correlation) if shared else correlation
        for i, found in enumerate(aggregate(q, k, v, count, shared=shared)):
            taus = judged[i].topk(count).indices.tolist()
            weights = correlation[i, taus].softmax(0)
            expected = sum(w * filled[1][i].roll(-tau, 0) for w, tau in zip(weights, taus, strict=True))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_forecast_does_not_depend_on_the_rest_of_its_batch():
    """Under transformers' own attention it does."""
    model, stock, batch = forecasts()
    alone = {name: value[2:3] for name, value in batch.items()}
    with torch.no_grad():
        for each, equal in ((model.eval(), True), (stock.eval(), False)):
            among, single = each(**batch).params[0][2], each(**alone).params[0][0]
            assert torch.allclose(among, single, rtol=1e-3, atol=1e-3) is equal


def test_a_step_of_autoformer_reads_nothing_back_from_its_device():
    """So that a CUDA graph can hold it: fake tensors have no values to read."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, _, batch = forecasts()
        batch["future_observed_mask"] = torch.ones_like(batch["future_values"])
        for objective in ("mse", "likelihood"):
            Forecasting(objective=objective).loss(model, batch, None).backward()


def test_autoformer_makes_no_mask_while_it_is_traced(monkeypatch):
    """As under a CUDA graph's capture: transformers' functions cannot tell then whether a mask would hide anything."""
    model, _, batch = forecasts()
    expected = model.eval()(**batch).params[0]
    monkeypatch.setattr("transformers.masking_utils.is_torchdynamo_exporting", lambda: True)
    assert torch.equal(model(**batch).params[0], expected)


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
        (lambda: Llama(heads=4, key_value_heads=3), "heads is 4; must be a multiple of key_value_heads = 3"),
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
