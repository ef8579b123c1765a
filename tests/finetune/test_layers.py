"""SARA's and Mo-SARA's layers against their formulas."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hpc_oialr.errors import ConfigError, ModelError
from hpc_oialr.finetune import SARA, HeadOnly, MoSARA, MoSaraLinear, SaraLinear, adapters, expert_load, merge_adapters
from hpc_oialr.linalg.svd import svd
from hpc_oialr.lowrank import Selection, trainable_parameters

WIDTH = Selection(kinds=("Linear",), keep_last=False)
X = torch.randn(7, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12, bias=False), nn.Linear(12, 3)).double()
    # Known singular values: 8, 4, 2, 1, 1, ... of a sum of 23.
    for layer in (layers[0], layers[2]):
        U, _, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        s = torch.tensor([8.0, 4.0, 2.0] + [1.0] * 9, dtype=torch.float64)
        layer.weight = nn.Parameter(U * s @ Vh)
    return layers


def disturbed(model: nn.Module) -> nn.Module:
    """Trained parameters as after a training."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


@pytest.mark.parametrize(("threshold", "r"), [(0.01, 1), (8 / 23, 1), (0.5, 2), (14.5 / 23, 4), (1.0, 12)])
def test_sara_starts_as_the_model_with_r_by_the_rule(threshold, r):
    dense, tuned = net(), net()
    SARA(threshold=threshold, selection=WIDTH).apply(tuned, {"3"})
    assert torch.equal(tuned(X), dense(X))
    assert {name: layer.r for name, layer in adapters(tuned).items()} == {"0": r, "2": r}
    assert trainable_parameters(tuned) == 2 * r * (12 + 20 + 1) + 3 * 13
    trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert trained == {f"{i}.{part}" for i in "02" for part in ("A", "lambda_", "B")} | {"3.weight", "3.bias"}
    # All names of the dense model are there: its weights load into the tuned one.
    assert set(dense.state_dict()) <= set(tuned.state_dict())


def test_sara_is_its_formula_and_merges():
    tuned = net()
    SARA(threshold=0.5, selection=WIDTH).apply(tuned)
    disturbed(tuned)
    layer = tuned[0]
    assert isinstance(layer, SaraLinear)
    W = layer.weight + layer.A @ torch.diag(layer.lambda_) @ layer.B
    torch.testing.assert_close(layer(X), F.linear(X, W, layer.bias))
    merged = merge_adapters(tuned)
    assert adapters(tuned)
    assert [type(m) for m in merged] == [nn.Linear, nn.Tanh, nn.Linear, nn.Linear]
    net().load_state_dict(merged.state_dict())
    torch.testing.assert_close(merged(X), tuned(X))
    assert merge_adapters(tuned, inplace=True) is tuned
    assert not adapters(tuned)


def test_mosara_is_its_formula_and_records_its_load():
    dense, tuned = net(), net()
    MoSARA(threshold=0.5, experts=3, selection=WIDTH).apply(tuned, {"3"})
    assert torch.equal(tuned.eval()(X), dense(X))
    disturbed(tuned)
    layer = tuned[0]
    assert isinstance(layer, MoSaraLinear)
    assert (layer.r, trainable_parameters(tuned)) == (2, 2 * 2 * 3 * 2 + 3 * 13)
    # U and Vh are those of W: their product with its own values is its best approximation.
    kept = layer.U.mT @ layer.weight @ layer.Vh.mT
    torch.testing.assert_close(kept, torch.diag(torch.tensor([8.0, 4.0], dtype=torch.float64)))
    gates = torch.stack([torch.softmax(layer.router @ layer.Vh @ x, 0) for x in X])
    expected = [
        F.linear(x, layer.weight + layer.U @ torch.diag(g @ layer.lambda_) @ layer.Vh, layer.bias)
        for x, g in zip(X, gates, strict=True)
    ]
    torch.testing.assert_close(layer(X), torch.stack(expected))
    assert (int(layer.tokens), expert_load(tuned)["0"].tolist()) == (0, [1 / 3] * 3), "evaluations are not counted"
    layer.train()
    for part in (X[:2], X[2:]):
        layer(part)
    torch.testing.assert_close(expert_load(tuned)["0"], gates.mean(0).detach())
    assert int(layer.tokens) == 7


def test_mosara_learns_different_sets():
    torch.manual_seed(0)
    layer = MoSaraLinear(nn.Linear(6, 6), svd(torch.eye(6)), 2)
    layer(torch.randn(9, 6)).square().mean().backward()
    one, other = layer.lambda_.grad
    assert not torch.allclose(one, other)


def test_mosara_is_not_merged_but_by_its_mean():
    tuned = net()
    MoSARA(selection=WIDTH).apply(tuned)
    disturbed(tuned)
    before = copy.deepcopy(tuned.state_dict())
    with pytest.raises(ModelError, match=r"cannot be merged: its router .* anew for every token"):
        merge_adapters(tuned, inplace=True)
    assert tuned.state_dict().keys() == before.keys()
    layer = tuned[0]
    W = layer.weight + layer.U @ torch.diag(layer.load @ layer.lambda_) @ layer.Vh
    torch.testing.assert_close(merge_adapters(tuned, by_mean_load=True)[0].weight, W)


def test_refusals():
    with pytest.raises(ConfigError, match=r"rule.threshold is 0; must lie in \(0, 1\]"):
        SARA(threshold=0)
    with pytest.raises(ConfigError, match="experts is 0; must be at least 1"):
        MoSARA(experts=0)
    encoder = nn.TransformerEncoderLayer(16, 2, 32)
    with pytest.raises(ModelError, match="TransformerEncoderLayer has no linear layer that SARA"):
        SARA(selection=WIDTH).apply(encoder)
    assert all(p.requires_grad for p in encoder.parameters())
    head_only = net()
    HeadOnly().apply(head_only, {"3"})
    assert [name for name, p in head_only.named_parameters() if p.requires_grad] == ["3.weight", "3.bias"]
