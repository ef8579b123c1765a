"""What a user did to a weight keeps its layer dense, and is named."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from hpc_oialr.lowrank import Selection, convert, merge, select
from hpc_oialr.lowrank.marks import accumulation_hooks, gradient_hooks
from hpc_oialr.lowrank.selection import examine

EVERY = Selection(keep_last=False)


def three() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 6))


def tag(name: str) -> Callable[[nn.Sequential], None]:
    return lambda model: setattr(model[1], name, "a tag")


def tie(model: nn.Sequential) -> None:
    model[1].weight.data = model[0].weight.data.new_zeros(12, 12)
    model.register_buffer("copy", model[1].weight.data[3:5])


def tie_by_set(model: nn.Sequential) -> None:
    other = nn.Conv1d(12, 12, 1)
    with torch.no_grad():
        other.weight.set_(model[1].weight.view(12, 12, 1))
    model.add_module("late", other)


class Marked(nn.Parameter):
    pass


def replace(new: Callable[[Tensor], Tensor]) -> Callable[[nn.Sequential], None]:
    def act(model: nn.Sequential) -> None:
        weight = new(model[1].weight.detach())
        floating = weight.is_floating_point() or weight.is_complex()
        model[1]._parameters["weight"] = nn.Parameter(weight, requires_grad=floating)

    return act


def subclass(model: nn.Sequential) -> None:
    model[1].weight = Marked(model[1].weight.detach())


def hook(model: nn.Sequential) -> None:
    model[1].weight.register_hook(lambda g: 2 * g)


def hook_partial(model: nn.Sequential) -> None:
    model[1].weight.register_hook(functools.partial(torch.mul, 2))
    model[1].weight.register_hook(functools.partial(lambda k, g: k * g, 2))


def patch(model: nn.Sequential) -> None:
    plain = model[1].forward
    model[1].forward = lambda x: 2 * plain(x)  # type: ignore[method-assign]


def keep_momentum(model: nn.Sequential) -> None:
    model[1].weight.momentum = torch.zeros(12, 12)  # type: ignore[attr-defined]


DEEDS: dict[str, tuple[Callable[[nn.Sequential], None], str]] = {
    "attribute U": (tag("U"), "attributes of its own that a low-rank layer needs: U"),
    "attribute n": (tag("n"), "needs: n"),
    "attribute factors": (tag("factors"), "needs: factors"),
    "attribute dense_class": (tag("dense_class"), "needs: dense_class"),
    "buffer S": (lambda model: model[1].register_buffer("S", torch.ones(2)), "needs: S"),
    "module Vh": (lambda model: model[1].add_module("Vh", nn.ReLU()), "needs: Vh"),
    "aliasing buffer": (tie, "shares memory with copy"),
    "tie by set_": (tie_by_set, "shares memory with late.weight"),
    "gradient hook": (hook, "has a gradient hook"),
    "partial hook": (hook_partial, "has a gradient hook"),
    "forward of its own": (patch, "forward was replaced"),
    "complex": (replace(lambda w: w.to(torch.complex64)), "dtype complex64"),
    "float8": (replace(lambda w: w.to(torch.float8_e4m3fn)), "dtype float8_e4m3fn"),
    "int8": (replace(lambda w: w.to(torch.int8)), "dtype int8"),
    "sparse": (replace(lambda w: w.to_sparse()), "stored as sparse_coo"),
    "tensor on the parameter": (keep_momentum, "tensors of its own, which a core cannot take: momentum"),
    "parameter of another class": (subclass, "its weight is a Marked"),
}


@pytest.mark.parametrize("deed", DEEDS)
def test_a_layer_that_conversion_would_harm_stays_dense(deed: str) -> None:
    model = three()
    act, expected = DEEDS[deed]
    act(model)
    targets, refused = examine(model, EVERY)
    assert {target.name for target in targets} == {"0", "2"}
    assert expected in refused["1"].reason
    assert refused["1"].warn, "no setting says so, therefore the user is warned"
    convert(model, EVERY)
    assert type(model[1]) is nn.Linear


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d])
def test_a_kind_whose_forward_was_replaced_stays_dense(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * plain(self, x))
    model = nn.Sequential(nn.Linear(8, 12), nn.Conv1d(8, 8, 3), nn.Conv2d(8, 8, 3))
    _, refused = examine(model, EVERY)
    (reason,) = (each.reason for each in refused.values())
    assert reason == f"the forward of {kind.__name__} was replaced for all its layers"


def test_parameters_side_by_side_in_one_buffer_are_not_tied() -> None:
    model = three()
    flat = torch.randn(sum(p.numel() for p in model.parameters()))
    at = 0
    for p in model.parameters():
        p.data = flat[at : at + p.numel()].view(p.shape)
        at += p.numel()
    assert [target.name for target in select(model, EVERY)] == ["0", "1", "2"]


def test_hooks_of_engines_are_no_users_hooks() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    p.register_hook(torch.neg)
    p.register_post_accumulate_grad_hook(functools.partial(torch.nn.functional.relu))
    assert not gradient_hooks(p)
    assert not accumulation_hooks(p)
    p.register_post_accumulate_grad_hook(lambda p: None)
    assert len(accumulation_hooks(p)) == 1


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 24, 12))
        self.lists = nn.ParameterList([torch.randn(12, 12), torch.randn(12)])
        self.table = nn.ParameterDict({"w1": torch.randn(2, 6, 6)})
        self.lstm = nn.LSTM(4, 4)


def test_matrices_of_no_known_layer_are_named_with_their_share(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(12, 12), Experts(), nn.Linear(12, 12), nn.LazyLinear(3))
    with caplog.at_level(logging.INFO, logger="hpc_oialr"):
        select(model)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING, "most of the numbers stay dense"
    text = record.getMessage()
    for expected in (
        "1.gate_up_proj (a bare parameter, 4 x 24 x 12, 62% of all numbers)",
        "1.lists.0 (a bare parameter, 12 x 12, 8% of all numbers)",
        "1.table.w1 (a bare parameter, 2 x 6 x 6, 4% of all numbers)",
        "1.lstm (unknown kind LSTM, 7% of all numbers)",
        "2 (first or last layer)",
        "3 (unknown kind LazyLinear without a shape yet; call the model once",
    ):
        assert expected in text
    assert "lists.1" not in text, "a vector is no matrix"
    assert text.index("gate_up_proj") < text.index("2 (first")


def test_known_layers_with_a_matrix_more_and_parametrized_ones() -> None:
    model = three()
    model[1].register_parameter("extra", nn.Parameter(torch.ones(3, 3)))
    parametrizations.orthogonal(model[2])
    targets, refused = examine(model, EVERY)
    assert [target.name for target in targets] == ["0", "1"]
    assert refused["1.extra"].reason.startswith("a bare parameter, 3 x 3")
    assert refused["2"].reason == "its weight is parametrized"
    assert set(refused) == {"1.extra", "2"}


def test_attributes_of_a_parameter_survive_conversion_and_merge() -> None:
    model = three()
    model[0].weight.no_weight_decay = True  # type: ignore[attr-defined]
    model[0].weight._optim = {"lr": 0.1}  # type: ignore[attr-defined]
    convert(model)
    assert model[0].S.no_weight_decay
    layer = model[0]
    layer.set_factors(layer.U[:, :4], layer.S[:4, :4], layer.Vh[:4])
    assert layer.S._optim == {"lr": 0.1}
    assert not hasattr(layer.U, "no_weight_decay")
    merged = merge(model, inplace=True)[0].weight
    assert merged.no_weight_decay
    assert merged._optim == {"lr": 0.1}


def test_hooks_of_a_core_survive_a_cut() -> None:
    model = three()
    convert(model)
    layer, calls = model[0], []
    handle = layer.S.register_hook(lambda g: calls.append("gradient"))
    layer.S.register_post_accumulate_grad_hook(lambda p: calls.append(tuple(p.shape)))
    layer.set_factors(layer.U[:, :4], layer.S[:4, :4], layer.Vh[:4])
    model(torch.randn(3, 8)).sum().backward()
    assert calls == ["gradient", (4, 4)]
    handle.remove()
    model(torch.randn(3, 8)).sum().backward()
    assert calls == ["gradient", (4, 4), (4, 4)]


def test_frozen_weights_and_trained_bases() -> None:
    model = three()
    model[0].weight.requires_grad_(False)
    assert [target.name for target in select(model)] == ["1"]
    assert [target.name for target in select(model, frozen=True)] == ["0", "1"]
    convert(model)
    model.requires_grad_(True)
    model(torch.randn(3, 8)).sum().backward()
    layer = model[1]
    assert not layer.U.requires_grad
    assert layer.Vh.grad is None
    layer.bases_trained = True
    model.requires_grad_(True)
    model(torch.randn(3, 8)).sum().backward()
    assert layer.U.grad is not None
    assert not hasattr(merge(model)[1], "dense_shape")
