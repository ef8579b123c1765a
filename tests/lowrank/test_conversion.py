"""Which layers convert, what stays dense and why, and the way back."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from hpc_oialr import Selection, dense_parameters, low_rank_layers, merge, trainable_parameters
from hpc_oialr.errors import ConfigError, NonFiniteError, UnknownNameError
from hpc_oialr.lowrank import convert, select


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Flatten(),
        nn.Linear(128, 32),
        nn.Linear(32, 10),
    )


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=16))


def vit() -> nn.Module:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=5, **size))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(16, 4))


MODELS = {"conv net": conv_net, "GPT-2": gpt2, "ViT": vit, "torch encoder": encoder}
INPUTS = {
    "conv net": lambda: torch.randn(2, 4, 8, 8),
    "GPT-2": lambda: torch.randint(0, 64, (2, 16)),
    "ViT": lambda: torch.randn(2, 1, 8, 8),
    "torch encoder": lambda: torch.randn(2, 5, 16),
}


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.logits


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name: str) -> None:
    torch.manual_seed(0)
    original = MODELS[name]().eval()
    model, x = copy.deepcopy(original), INPUTS[name]()
    expected = output(original, x)
    assert convert(model)
    torch.testing.assert_close(output(model, x), expected, rtol=0, atol=5e-5)
    dense = merge(model)
    assert low_rank_layers(model), "merge must leave its argument alone"
    assert [(k, type(m)) for k, m in dense.named_modules()] == [(k, type(m)) for k, m in original.named_modules()]
    assert [k for k, _ in dense.named_parameters()] == [k for k, _ in original.named_parameters()]
    untouched = MODELS[name]().eval()
    untouched.load_state_dict(dense.state_dict(), strict=True)
    torch.testing.assert_close(output(untouched, x), expected, rtol=0, atol=5e-5)


def test_truncation_is_the_best_approximation() -> None:
    layer = nn.Sequential(nn.Linear(20, 12, bias=False), nn.Linear(12, 3))
    W = layer[0].weight.detach().clone()
    convert(layer, fraction=0.5)
    s = torch.linalg.svdvals(W)
    error = torch.linalg.matrix_norm(layer[0].weight.detach() - W)
    torch.testing.assert_close(error, s[6:].square().sum().sqrt())


def test_dense_reasons_are_named_once_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(nn.Linear):
        pass

    tied = nn.Linear(8, 8)
    other = nn.Linear(8, 8)
    other.weight = tied.weight
    frozen = nn.Linear(8, 8)
    frozen.weight.requires_grad_(False)
    model = nn.ModuleDict(
        {
            "tied": tied,
            "other": other,
            "normed": parametrizations.weight_norm(nn.Linear(8, 8)),
            "odd": Odd(8, 8),
            "frozen": frozen,
            "grouped": nn.Conv1d(8, 8, 3, groups=4),
            "thin": nn.Linear(8, 100),
            "plain": nn.Linear(8, 8),
            "skipped": nn.Linear(8, 8),
            "last": nn.Linear(8, 8),
        }
    )
    with caplog.at_level(logging.INFO, logger="hpc_oialr"):
        targets = select(model, Selection(exclude=("skip*",)))
    assert [target.name for target in targets] == ["plain"]
    assert len(caplog.records) == 1
    text = caplog.text
    for expected in (
        "tied (its weight is tied to another layer's)",
        "other (its weight is tied",
        "normed (its weight is parametrized)",
        "odd (unknown kind Odd, 4% of all numbers)",
        "frozen (its weight is frozen)",
        "grouped (it is a grouped convolution)",
        "thin (its shape 100 x 8 is too thin)",
        "skipped (not selected)",
        "last (first or last layer)",
    ):
        assert expected in text


def test_old_style_weight_norm_is_left_dense() -> None:
    with pytest.warns(FutureWarning):
        normed = nn.utils.weight_norm(nn.Linear(8, 8))
    model = nn.Sequential(normed, nn.Linear(8, 8), nn.Linear(8, 8))
    assert [target.name for target in select(model)] == ["1"]


def test_tied_language_model_head_stays() -> None:
    names = {target.name for target in select(gpt2())}
    assert "lm_head" not in names
    assert names == {f"transformer.h.{i}.{part}" for i in (0, 1) for part in
                     ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}  # fmt: skip


def test_first_layer_and_kinds() -> None:
    names = [target.name for target in select(conv_net(), Selection(keep_first=True, kinds=("Linear", "Conv2d")))]
    assert names == ["4"]
    with pytest.raises(UnknownNameError, match="unknown layer kind 'Linea'; valid: .*Did you mean 'Linear'"):
        Selection(kinds=("Linea",))
    with pytest.raises(ConfigError, match="max_aspect is 0.5; must be at least 1"):
        Selection(max_aspect=0.5)


def test_nan_weight_is_named() -> None:
    model = conv_net()
    with torch.no_grad():
        model[4].weight[3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="4 holds 1 NaN"):
        convert(model)


def test_hooks_references_and_mode_survive() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)).eval()
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    kept = model[0]
    convert(model)
    assert model[0] is kept
    assert not model[0].training
    model(torch.randn(3, 8, requires_grad=True)).sum().backward()
    assert calls == ["forward", "backward"]


def test_state_dict_into_another_r() -> None:
    torch.manual_seed(0)
    wide, narrow = (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)) for _ in range(2))
    convert(wide)
    convert(narrow, fraction=0.5)
    wide.load_state_dict(narrow.state_dict())
    x = torch.randn(3, 8)
    assert low_rank_layers(wide)["0"].r == 4
    assert not wide[0].U.requires_grad
    torch.testing.assert_close(wide(x), narrow(x))
    with torch.no_grad():
        wide[0].S.zero_()
    assert narrow[0].S.abs().sum() > 0, "loading must not share memory"


def test_deepcopy_is_independent() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    convert(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].S.zero_()
    assert model[0].S.abs().sum() > 0
    assert type(merge(twin)[0]) is nn.Linear


def test_parameter_counts() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2))
    dense = trainable_parameters(model)
    convert(model, fraction=0.5)
    assert dense_parameters(model) == dense
    assert trainable_parameters(model) == dense - 8 * 16 + 4 * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_merge_keeps_the_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)).to(dtype)
    convert(model)
    assert {p.dtype for p in merge(model).parameters()} == {dtype}
