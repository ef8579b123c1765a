"""``layer.weight`` of a low-rank layer can be read like a dense one; a write into it is an error."""

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


WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "mul_": lambda w, _: w.mul_(0.5),
    "data.mul_": lambda w, _: w.data.mul_(0.5),
    "detach().mul_": lambda w, _: w.detach().mul_(0.5),
    "*=": augmented,
    "[:] =": by_item,
    "view": by_view,
    "rows": by_rows,
    "transposed": lambda w, _: w.flatten(1).T.mul_(0.5),
    "out=": by_out,
    ".data =": by_data,
    "_foreach_mul_": many_at_once,
    "lerp_": lambda w, other: w.lerp_(other, 0.25),
    "copy_": lambda w, other: w.copy_(other),
    "add_": lambda w, other: w.data.add_(other, alpha=-0.1),
    "zero_": lambda w, _: w.zero_(),
    "set_": lambda w, other: w.set_(other),
    "init.zeros_": lambda w, _: nn.init.zeros_(w),
    "init.uniform_": lambda w, _: nn.init.uniform_(w, -0.01, 0.01),
    "init.trunc_normal_": lambda w, _: nn.init.trunc_normal_(w, std=0.002, a=-0.01, b=0.01),
    "clamp_": lambda w, _: w.clamp_(-0.01, 0.01),
    "data.clamp_": lambda w, _: w.data.clamp_(-0.01, 0.01),
    "item": lambda w, _: w[0].fill_(0.01),
    "renorm_": lambda w, _: w.renorm_(2, 0, 0.01),
    "threshold": lambda w, _: F.threshold(w, -0.01, -0.01, inplace=True),
    "setattr": lambda w, _: setattr(w, "data", w.data.clamp(-0.01, 0.01)),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_refused_and_changes_nothing(write: str, kind: str, inference: bool) -> None:
    layer = layer_of(kind)
    before, other = layer.weight.detach().clone(), torch.rand(layer.dense_shape)
    with torch.inference_mode(inference), torch.no_grad():
        with pytest.raises(ModelError, match="written in place, but it is built from U, S and Vh at each access"):
            WRITES[write](layer.weight, other)
        with pytest.raises(ModelError, match="Clip, constrain or initialise layer.S instead"):
            WRITES[write](layer.weight, other)
    assert torch.equal(layer.weight, before)
    x = x_for(layer)
    torch.testing.assert_close(layer(x), merge(layer)(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    layer = layer_of().to(dtype)
    with torch.no_grad(), pytest.raises(ModelError, match="written in place"):
        layer.weight.mul_(0.5)


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
    torch.testing.assert_close(functional_call(layer, {"S": 0 * layer.S}, (torch.ones(1, 12),))[0], layer.bias)
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
    with pytest.raises(ModelError, match="written in place"):
        linear.reset_parameters()
    assert type(merge(conv)) is nn.Conv2d


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_scripting_is_refused() -> None:
    with pytest.raises(ModelError, match=r"torch.jit.script cannot compile low-rank layers. Script hpc_oialr.merge"):
        torch.jit.script(nn.Sequential(layer_of()))
