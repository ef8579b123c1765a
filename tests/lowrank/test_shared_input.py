"""Layers with one input multiply it together, and compute what they compute alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hpc_oialr.lowrank import Selection, convert
from hpc_oialr.lowrank import shared_input as module
from hpc_oialr.lowrank.shared_input import share_inputs


class Projections(nn.Module):
    def __init__(self, *, one_input: bool = True) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(12, 12),
            nn.Linear(12, 8),
            nn.Linear(12, 8, bias=False),
        )
        self.one_input = one_input

    def forward(self, x: Tensor) -> Tensor:
        other = x if self.one_input else x + 1
        return torch.cat([self.k_proj(x), self.q_proj(x), self.v_proj(other)], dim=-1)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEVICES", ("cpu",))


def models(*, one_input: bool = True) -> tuple[nn.Module, nn.Module]:
    """The same layers, of several r, alone and together."""
    torch.manual_seed(0)
    alone = Projections(one_input=one_input).double()
    convert(alone, Selection(keep_last=False), fraction=0.5)
    together = copy.deepcopy(alone)
    share_inputs(together)
    return alone, together


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    model.zero_grad()
    return found


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each common product served."""
    found: list[int] = []
    multiply = module.SharedInput._multiply

    def counted(self, x):
        parts = multiply(self, x)
        found.append(len(parts))
        return parts

    monkeypatch.setattr(module.SharedInput, "_multiply", counted)
    return found


@pytest.mark.parametrize("bases_trained", [False, True])
def test_output_and_gradients_are_those_of_the_layers_alone(monkeypatch, bases_trained):
    alone, together = models()
    for model in (alone, together):
        for layer in (model.q_proj, model.k_proj, model.v_proj):
            layer.bases_trained = bases_trained
            for basis in (layer.U, layer.Vh):
                basis.requires_grad_(bases_trained)
    found = calls(monkeypatch)
    x = torch.randn(4, 10, 12, dtype=torch.float64)
    for _ in range(2):
        for ours, theirs in zip(gradients(together, x), gradients(alone, x), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert found == [3, 3]


def test_few_tokens_and_autocast():
    alone, together = models()
    x = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(together(x), alone(x))
    alone, together = alone.float(), together.float()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = (
            model(torch.randn(40, 12, generator=torch.Generator().manual_seed(1))) for model in (together, alone)
        )
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.03, atol=0.03)


def test_layers_with_unequal_inputs_are_left_alone_after_a_while(monkeypatch):
    alone, together = models(one_input=False)
    found = calls(monkeypatch)
    x = torch.randn(40, 12, dtype=torch.float64)
    for _ in range(12):
        torch.testing.assert_close(together(x), alone(x))
    assert 0 < len(found) < 24


def test_an_input_written_into_between_two_layers_is_read_again():
    alone, together = models()
    x = torch.randn(40, 12, dtype=torch.float64)
    with torch.no_grad():
        first = together.q_proj(x)
        x.add_(1)
        torch.testing.assert_close(together.k_proj(x), alone.k_proj(x))
        assert not torch.equal(first, together.q_proj(x))


def test_under_torch_compile_and_recomputation():
    alone, together = models()
    x = torch.randn(40, 12, dtype=torch.float64)
    compiled = torch.compile(together, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(gradients(compiled, x), gradients(alone, x), strict=True):
        torch.testing.assert_close(ours, theirs)

    def recomputed(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(together, x, use_reentrant=False)

    leaf = x.clone().requires_grad_()
    recomputed(leaf).square().sum().backward()
    torch.testing.assert_close(leaf.grad, gradients(alone, x)[1])


def test_a_copy_of_a_layer_works_by_itself():
    _, together = models()
    layer = copy.deepcopy(together.q_proj)
    assert layer.shared_input is None
    x = torch.randn(40, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), together.q_proj(x))


def test_a_layer_that_is_dense_again_leaves_the_others_by_themselves():
    alone, together = models()
    x = torch.randn(40, 12, dtype=torch.float64)
    for model in (alone, together):
        model.k_proj.become_dense()
    torch.testing.assert_close(together(x), alone(x))
