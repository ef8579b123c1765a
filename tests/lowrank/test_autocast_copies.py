"""Copies of the frozen factors for autocast: made once, right after every change, and no part of the state."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_oialr import OIALR, FixedFraction, OIALRConfig, RankLimits, Selection, merge
from hpc_oialr.engines import SingleEngine
from hpc_oialr.lowrank import LowRankWeight, convert, low_rank_layers
from hpc_oialr.lowrank.base import AutocastCopies
from hpc_oialr.record.memory import resident_bytes

ALL = Selection(keep_first=False, keep_last=False, max_aspect=100)


class Casts(TorchDispatchMode):
    """Shapes of what was cast to bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten._to_copy and result.dtype == torch.bfloat16:
            self.shapes.append(tuple(result.shape))
        return result


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(40, 24)


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "linear": (lambda: nn.Linear(24, 40), lambda m: m(torch.ones(3, 24))),
    "merged": (lambda: nn.Linear(24, 40), lambda m: m(torch.ones(3, 24))),
    "Conv1D": (conv1d, lambda m: m(torch.ones(3, 24))),
    "conv2d": (lambda: nn.Conv2d(6, 20, 3), lambda m: m(torch.ones(2, 6, 8, 8))),
    "attention": (
        lambda: nn.MultiheadAttention(24, 2),
        lambda m: m(torch.ones(5, 24), torch.zeros(5, 24), torch.zeros(5, 24))[0],
    ),
}


def pair(kind: str) -> tuple[nn.Module, nn.Module]:
    """With copies and without."""
    torch.manual_seed(0)
    made = nn.Sequential(KINDS[kind][0]())
    convert(made, ALL, fraction=0.25 if kind != "merged" else 0.5)
    plain = copy.deepcopy(made)
    for layer in low_rank_layers(made).values():
        layer.autocast_copies = AutocastCopies()
        layer.crossover = 0.0 if kind == "merged" else 9.0
    for layer in low_rank_layers(plain).values():
        layer.crossover = 0.0 if kind == "merged" else 9.0
    return made, plain


def forward(kind: str, model: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return KINDS[kind][1](next(model.children()))


@pytest.mark.parametrize("kind", KINDS)
def test_same_results_without_a_cast_of_frozen_factors(kind: str) -> None:
    model, plain = pair(kind)
    frozen = {tuple(x.shape) for layer in low_rank_layers(model).values() for x in (layer.U, layer.Vh)}
    for casts in (True, False):
        with Casts() as seen:
            y = forward(kind, model)
        assert bool(frozen & set(seen.shapes)) == casts
        y.float().square().sum().backward()
    for _ in range(2):
        expected = forward(kind, plain)
        expected.float().square().sum().backward()
    assert torch.equal(y, expected)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)


def in_place(layer: LowRankWeight) -> None:
    with torch.no_grad():
        layer.U.neg_()


def same_shape(layer: LowRankWeight) -> None:
    layer.set_factors(layer.U * 2, layer.S, layer.Vh * 3)


def smaller(layer: LowRankWeight) -> None:
    layer.set_factors(layer.U[:, :3], layer.S[:3, :3], layer.Vh[:3])


def loaded(layer: LowRankWeight) -> None:
    layer.load_state_dict({name: value * 2 for name, value in layer.state_dict().items()})


def loaded_with_another_r(layer: LowRankWeight) -> None:
    state = {**layer.state_dict(), "U": layer.U[:, :3], "S": layer.S[:3, :3], "Vh": layer.Vh[:3]}
    layer.load_state_dict({name: value.clone() for name, value in state.items()})


def cast(layer: LowRankWeight) -> None:
    layer.half()
    layer.U.data.mul_(2)


def new_values_under_the_old_names(layer: LowRankWeight) -> None:
    layer.Vh = nn.Parameter(-layer.Vh, requires_grad=False)


CHANGES = (
    in_place,
    same_shape,
    smaller,
    loaded,
    loaded_with_another_r,
    cast,
    new_values_under_the_old_names,
)


@pytest.mark.parametrize("change", CHANGES)
def test_copies_follow_every_change(change: Callable[[LowRankWeight], None]) -> None:
    model, plain = pair("linear")
    first = forward("linear", model)
    for m in (model, plain):
        change(low_rank_layers(m)["0"])
    got = forward("linear", model)
    assert torch.equal(got, forward("linear", plain))
    assert not torch.equal(got, first)


def test_a_change_without_a_new_shape_keeps_the_place_of_the_copies() -> None:
    model, _ = pair("linear")
    forward("linear", model)
    layer = low_rank_layers(model)["0"]
    assert layer.autocast_copies is not None
    before = [x.data_ptr() for x in layer.autocast_copies.tensors]
    same_shape(layer)
    assert [x.data_ptr() for x in layer.autocast_copies.tensors] == before
    assert torch.equal(layer.autocast_copies.tensors[0], layer.U.bfloat16())


def test_factors_that_train_are_used_themselves() -> None:
    model, plain = pair("linear")
    forward("linear", model)
    for m in (model, plain):
        for p in m.parameters():
            p.requires_grad_(True)
        low_rank_layers(m)["0"].bases_trained = True
        forward("linear", m).float().sum().backward()
        torch.optim.SGD(m.parameters(), lr=0.1).step()
        low_rank_layers(m)["0"].U.requires_grad_(False)
        low_rank_layers(m)["0"].Vh.requires_grad_(False)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)
    assert torch.equal(forward("linear", model), forward("linear", plain))


def test_autocast_leaves_float64_alone() -> None:
    x, y = (torch.ones(3, 24, dtype=torch.float64) for _ in range(2))
    model, plain = (m.double() for m in pair("linear"))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), plain(y))
        assert model(x).dtype == torch.float64


def test_an_evaluation_in_inference_mode_leaves_copies_that_can_be_trained_with() -> None:
    model, _ = pair("linear")
    with torch.inference_mode():
        forward("linear", model)
    forward("linear", model).float().sum().backward()
    assert low_rank_layers(model)["0"].S.grad is not None


def test_copies_are_no_state_but_counted() -> None:
    model, plain = pair("linear")
    without = resident_bytes(model)
    forward("linear", model)
    layer = low_rank_layers(model)["0"]
    assert resident_bytes(model) - without == 2 * (layer.U.numel() + layer.Vh.numel())
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert dict(model.named_buffers()) == {}
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert resident_bytes(twin) == without
        assert torch.equal(forward("linear", twin), forward("linear", model))
    dense = merge(model)
    assert not hasattr(dense[0], "autocast_copies")
    assert type(dense[0]) is nn.Linear


def test_the_controller_gives_copies_to_whole_factors_only() -> None:
    def layers(whole: bool) -> list[LowRankWeight]:
        engine = SingleEngine()
        engine.whole_factors = whole
        model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 8))
        limits = RankLimits(at_conversion=0.5)
        config = OIALRConfig(delay=1, frequency=1, rule=FixedFraction(0.25), limits=limits)
        oialr = OIALR(model, torch.optim.SGD(model.parameters(), 0.1), config, engine=engine)
        oialr.step()
        return list(low_rank_layers(model).values())

    assert [layer.autocast_copies is not None for layer in [*layers(True), *layers(False)]] == [True, False]


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float64", 1e-4), ("float32", 1e-4), ("bfloat16", 2**-7), ("float16", 2**-10)]
)
def test_bases_are_not_repaired_for_the_rounding_of_their_storage(dtype: str, bound: float) -> None:
    config = OIALRConfig()
    stored = getattr(torch, dtype)
    assert config.bound_on_errors(stored) == bound
    assert OIALRConfig(orthogonality_bound=0.5).bound_on_errors(stored) == 0.5
    Q = torch.linalg.qr(torch.randn(96, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    Q = Q.to(stored).double()
    error = float(torch.linalg.matrix_norm(Q.mT @ Q - torch.eye(96, dtype=torch.float64))) / 96**0.5
    assert error < bound / 3
