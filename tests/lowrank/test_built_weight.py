"""Reads and writes through ``layer.weight`` of a low-rank layer: applied, or an error that names the line."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from hpc_oialr.errors import ModelError
from hpc_oialr.lowrank import LowRankWeight, Selection, convert, merge

EVERY = Selection(keep_last=False, max_aspect=100)


def layer_of(kind: str = "linear", fraction: float = 0.5) -> LowRankWeight:
    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(12, 8) if kind == "linear" else nn.Conv2d(3, 8, 2)
    convert(layer, EVERY, fraction=fraction)
    assert isinstance(layer, LowRankWeight)
    return layer


def x_for(layer: LowRankWeight) -> Tensor:
    return torch.randn(5, 12) if layer.n == 12 and len(layer.dense_shape) == 2 else torch.randn(2, 3, 4, 4)


def augmented(w: Tensor, _: Tensor) -> None:
    w *= 0.5


def by_item(w: Tensor, _: Tensor) -> None:
    w[:] = w * 0.5


def by_view(w: Tensor, _: Tensor) -> None:
    w.view(-1).mul_(0.5)


def by_rows(w: Tensor, _: Tensor) -> None:
    for row in w.unbind(0):
        row.mul_(0.5)


def by_out(w: Tensor, _: Tensor) -> None:
    torch.mul(w, 0.5, out=w)


def by_data(w: Tensor, _: Tensor) -> None:
    w.data = w.data * 0.5


def many_at_once(w: Tensor, _: Tensor) -> None:
    torch._foreach_mul_([torch.ones(2), w], 0.5)


# What each writes, from the weight as it was and from another one in the same bases.
HALF: Callable[[Tensor, Tensor], Tensor] = lambda w, _: w / 2  # noqa: E731
WRITES: dict[str, tuple[Callable[[Tensor, Tensor], object], Callable[[Tensor, Tensor], Tensor]]] = {
    "mul_": (lambda w, _: w.mul_(0.5), HALF),
    "data.mul_": (lambda w, _: w.data.mul_(0.5), HALF),
    "detach().mul_": (lambda w, _: w.detach().mul_(0.5), HALF),
    "*=": (augmented, HALF),
    "[:] =": (by_item, HALF),
    "view": (by_view, HALF),
    "rows": (by_rows, HALF),
    "transposed": (lambda w, _: w.flatten(1).T.mul_(0.5), HALF),
    "out=": (by_out, HALF),
    ".data =": (by_data, HALF),
    "_foreach_mul_": (many_at_once, HALF),
    "lerp_": (lambda w, other: w.lerp_(other, 0.25), lambda w, other: torch.lerp(w, other, 0.25)),
    "copy_": (lambda w, other: w.copy_(other), lambda _, other: other),
    "add_": (lambda w, other: w.data.add_(other, alpha=-0.1), lambda w, other: w - 0.1 * other),
    "zero_": (lambda w, _: w.zero_(), lambda w, _: torch.zeros_like(w)),
    "init.zeros_": (lambda w, _: nn.init.zeros_(w), lambda w, _: torch.zeros_like(w)),
}


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("write", WRITES)
def test_what_the_bases_can_express_is_applied(write: str, kind: str) -> None:
    layer = layer_of(kind)
    other = (layer.U @ torch.randn(layer.r, layer.r) @ layer.Vh).reshape(layer.dense_shape).detach()
    before, core = layer.weight.detach().clone(), layer.S
    act, result = WRITES[write]
    with torch.no_grad():
        act(layer.weight, other)
    expected = result(before, other)
    assert layer.S is core
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=0, atol=1e-5)
    x = x_for(layer)
    dense = merge(layer)
    torch.testing.assert_close(dense.weight.detach(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.clamp_(-0.01, 0.01),
        lambda w: w.data.clamp_(-0.01, 0.01),
        lambda w: nn.init.uniform_(w, -0.01, 0.01),
        lambda w: nn.init.trunc_normal_(w, std=0.002, a=-0.01, b=0.01),
        lambda w: (w[0].fill_(0.01), w[1:].zero_()),
        lambda w: w.renorm_(2, 0, 0.01),
        lambda w: w.copy_(torch.rand(8, 12) / 100),
        lambda w: F.threshold(w.clamp_(max=0.01), -0.01, -0.01, inplace=True),
        lambda w: setattr(w, "data", w.data.clamp(-0.01, 0.01)),
    ],
)  # fmt: skip
def test_what_they_cannot_is_kept_and_refused_when_used(write: Callable[[Tensor], object]) -> None:
    layer = layer_of()
    with torch.no_grad():
        write(layer.weight)
    W = layer.weight.detach().clone()
    assert W.abs().max() <= 0.0101
    with pytest.raises(
        ModelError, match=r"written in place \(.*test_built_weight.py:\d+\), and \d+% of it lies"
    ):
        layer(torch.randn(3, 12))
    with pytest.raises(ModelError, match="Clip, constrain or initialise layer.S instead"):
        layer.state_dict()
    assert torch.equal(merge(layer).weight, W), "merging keeps every number"
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(layer(torch.zeros(1, 12))[0], layer.bias), (
        "a further write that can be held settles it"
    )


def test_writes_in_inference_mode_are_noticed() -> None:
    layer = layer_of()
    before = layer.weight.detach().clone()
    with torch.inference_mode():
        layer.weight.mul_(0.5)
        layer.weight.view(-1).mul_(0.5)
    torch.testing.assert_close(layer.weight.detach(), before / 4, rtol=0, atol=1e-5)
    with torch.inference_mode():
        layer.weight.clamp_(-0.01, 0.01)
        with pytest.raises(ModelError, match="written in place"):
            layer(torch.ones(1, 12))


def test_at_full_r_every_write_is_applied() -> None:
    layer = layer_of(fraction=1.0)
    square = nn.Linear(8, 8)
    convert(square, EVERY)
    with torch.no_grad():
        square.weight.clamp_(-0.1, 0.1)
        layer.weight.mul_(3.0)
    assert square.weight.abs().max() <= 0.1 + 1e-6
    square(torch.ones(1, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    layer = layer_of().to(dtype)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.mul_(0.5)
        layer.weight.copy_(layer.weight)
    error = float((layer.weight.detach() - before / 2).abs().max() / before.abs().max())
    assert error < (1e-12 if dtype == torch.float64 else 2e-2)
    layer(torch.ones(2, 12, dtype=dtype))


def test_a_stale_weight_is_not_written() -> None:
    layer = layer_of()
    W = layer.weight
    with torch.no_grad():
        W.mul_(0.5)
        W.mul_(0.5)
        layer.S.mul_(2)
        with pytest.raises(ModelError, match="read before its factors changed"):
            W.mul_(0.5)


def test_reading_is_as_before() -> None:
    layer = layer_of()
    W = layer.weight
    assert type(W * 1) is Tensor
    assert type(W.clone()) is Tensor
    assert type(copy.deepcopy(W.detach())) is Tensor
    assert torch.equal(pickle.loads(pickle.dumps(W.detach())), W)
    assert repr(W).startswith("tensor(")
    assert (W.dtype, W.shape, W.device.type) == (torch.float32, (8, 12), "cpu")
    F.linear(torch.randn(4, 12), W, layer.bias).square().sum().backward()
    by_weight = layer.S.grad.clone()
    layer.S.grad = None
    torch.manual_seed(0)
    ema = torch.zeros(8, 12)
    S = layer.S.detach().clone()
    with torch.no_grad():
        ema.lerp_(layer.weight, 0.5)
        torch.testing.assert_close(ema, W / 2)
        torch.add(W, 1, out=ema)
    assert torch.equal(layer.S, S), "reading writes nothing"
    assert by_weight.shape == (4, 4)
    with pytest.raises(ValueError, match="read-only"):
        layer.weight.detach().numpy()[0, 0] = 1


def test_what_a_built_weight_cannot_do() -> None:
    layer = layer_of()
    W = layer.weight.detach().clone()
    with pytest.raises(ModelError, match="register_hook of its weight has no effect"):
        layer.weight.register_hook(lambda g: g)
    with pytest.raises(ModelError, match="a gradient of its weight has no effect"):
        layer.weight.grad = torch.ones(8, 12)
    layer.weight.grad = None
    for new in (nn.Parameter(W), W, None):
        with pytest.raises(ModelError, match="has no weight to assign to"):
            layer.weight = new  # type: ignore[misc, assignment]
    with pytest.raises(ModelError, match="in torch.func.functional_call give S"):
        functional_call(layer, {"weight": W}, (torch.ones(1, 12),))
    torch.testing.assert_close(
        functional_call(layer, {"S": 0 * layer.S}, (torch.ones(1, 12),))[0], layer.bias
    )
    with pytest.raises(ModelError, match=r"shape \(2,\) is written"), torch.no_grad():
        layer.weight.data = torch.ones(2)
    with pytest.raises(ValueError, match="does not have a parameter"):
        parametrizations.weight_norm(layer)
    torch.testing.assert_close(layer.weight.detach(), W)


def test_requires_grad_reaches_the_core() -> None:
    layer = layer_of()
    with torch.no_grad():
        layer.weight.requires_grad_(False)
    assert not layer.S.requires_grad
    layer.weight.requires_grad = True
    assert layer.S.requires_grad
    assert layer.weight.requires_grad


def test_layers_are_still_of_their_dense_class() -> None:
    """Loops of the form ``isinstance(m, nn.Linear)`` must not pass low-rank layers by."""
    linear, conv = layer_of(), layer_of("conv")
    assert isinstance(linear, nn.Linear)
    assert isinstance(conv, nn.Conv2d)
    linear.reset_parameters()
    with pytest.raises(ModelError, match="written in place"):
        linear(torch.ones(1, 12))
    assert type(merge(conv)) is nn.Conv2d


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_scripting_is_refused() -> None:
    with pytest.raises(
        ModelError, match=r"torch.jit.script cannot compile low-rank layers. Script hpc_oialr.merge"
    ):
        torch.jit.script(nn.Sequential(layer_of()))


def test_copies_and_loading() -> None:
    layer = layer_of()
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    with torch.no_grad():
        layer.weight.clamp_(-0.01, 0.01)
    twin = copy.deepcopy(layer)
    with pytest.raises(ModelError, match="written in place"):
        twin(torch.ones(1, 12))
    layer.load_state_dict(state)
    layer(torch.ones(1, 12))
    with torch.no_grad():
        twin.weight.mul_(0)
    assert layer.S.abs().sum() > 0
