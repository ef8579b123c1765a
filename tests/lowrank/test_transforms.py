"""Higher derivatives, torch.func, forward-mode AD, checkpointing, export: every layer kind against its dense twin."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from hpc_oialr.errors import ModelError
from hpc_oialr.lowrank import Selection, convert, low_rank_layers, merge


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x, x, x)[0]
        return result


# Inner dimension 8, so that the products of linear layers go to oneDNN in fp32.
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 8), (3, 12)),
    "linear without bias": (lambda: nn.Linear(8, 12, bias=False), (3, 8)),
    "Conv1D": (lambda: Conv1D(12, 8), (3, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3), (2, 4, 5)),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), (2, 4, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 8, 2), (2, 2, 2, 3, 2)),
    "attention": (SelfAttention, (2, 3, 8)),
}
WAYS = [(kind, torch.float64, how) for kind in KINDS for how in ("factored", "merged")]
WAYS += [(kind, torch.float32, "factored") for kind in ("linear", "linear without bias", "Conv1D")]


def twins(kind: str, dtype: torch.dtype, how: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A dense layer and its low-rank twin at r = k in float64 or ``dtype``, and an input in float64."""
    torch.manual_seed(0)
    dense = KINDS[kind][0]().double()
    for p in dense.parameters():
        nn.init.normal_(p, std=0.4)
    low = copy.deepcopy(dense)
    convert(low, Selection(keep_last=False, max_aspect=100))
    low.to(dtype)
    for layer in low_rank_layers(low).values():
        layer.crossover = 100.0 if how == "factored" else 0.0
    return dense, low, torch.randn(KINDS[kind][1], dtype=torch.float64)


def scalar(layer: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = layer(x).tanh().square().sum()
    return result


def forward_dual(layer: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        tangent = forward_ad.unpack_dual(scalar(layer, dual)).tangent
    assert tangent is not None
    return tangent


def third_derivative(layer: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(scalar(layer, x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    return torch.autograd.grad(second.square().sum(), x)[0]


def batched_gradients(layer: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    y = layer(x)
    seeds = torch.stack([torch.ones_like(y), y.detach().cos()])
    return torch.autograd.grad(y, x, seeds, is_grads_batched=True)[0]


def per_sample_gradients(layer: nn.Module, x: Tensor) -> Tensor:
    return vmap(lambda one: grad(lambda z: scalar(layer, z[None]))(one))(x)


def called_functionally(layer: nn.Module, x: Tensor) -> Tensor:
    twice = {name: 2 * p.detach() for name, p in layer.named_parameters() if "bias" in name}
    return functional_call(layer, twice, (x,))


def recomputed(layer: nn.Module, x: Tensor, *, reentrant: bool) -> Tensor:
    x = x.clone().requires_grad_()
    checkpoint(lambda z: scalar(layer, z), x, use_reentrant=reentrant).backward()
    assert x.grad is not None
    return x.grad


def exported(layer: nn.Module, x: Tensor) -> Tensor:
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    result: Tensor = program.module()(torch.cat([x, x.cos(), x]))
    return result


def traced(layer: nn.Module, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated in some versions, and warns of every branch
        result: Tensor = torch.jit.trace(layer, x, check_trace=False)(x.cos())
    return result


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "third derivative": third_derivative,
    "torch.func.hessian": lambda layer, x: hessian(lambda z: scalar(layer, z))(x),
    "jacrev": lambda layer, x: jacrev(layer)(x),
    "jacfwd": lambda layer, x: jacfwd(lambda z: scalar(layer, z))(x),
    "vmap": lambda layer, x: vmap(lambda one: layer(one[None]))(x),
    "per-sample gradients": per_sample_gradients,
    "jvp of grad": lambda layer, x: jvp(grad(lambda z: scalar(layer, z)), (x,), (x.cos(),))[1],
    "vjp": lambda layer, x: vjp(layer, x)[1](layer(x).detach().cos())[0],
    "forward-mode AD": forward_dual,
    "batched gradients": batched_gradients,
    "functional_call": called_functionally,
    "checkpoint": lambda layer, x: recomputed(layer, x, reentrant=False),
    "reentrant checkpoint": lambda layer, x: recomputed(layer, x, reentrant=True),
    "jit.trace": traced,
}


@pytest.mark.filterwarnings("ignore:.torch.jit")  # of torch's own, at its first forward-mode derivative
@pytest.mark.parametrize(("kind", "dtype", "how"), WAYS)
def test_as_the_dense_layer(kind: str, dtype: torch.dtype, how: str) -> None:
    dense, low, x = twins(kind, dtype, how)
    for name, transform in TRANSFORMS.items():
        expected, got = transform(dense, x), transform(low, x.to(dtype))
        assert got.dtype == dtype
        error = float((got - expected).detach().abs().max() / expected.detach().abs().max())
        assert error < (1e-10 if dtype == torch.float64 else 2e-4), (name, error)


@pytest.mark.parametrize(("kind", "dtype", "how"), WAYS)
def test_gradient_penalty_trains_the_core_as_the_weight(kind: str, dtype: torch.dtype, how: str) -> None:
    """R1 and WGAN-GP: the gradient of a gradient's norm, projected, for the core and the bias."""
    dense, low, x = twins(kind, dtype, how)
    for layer, z in ((dense, x.clone()), (low, x.to(dtype))):
        z.requires_grad_()
        (g,) = torch.autograd.grad(scalar(layer, z), z, create_graph=True)
        (g.square().sum() + layer(z).square().mean()).backward()
    dense_grads = {name: p.grad for name, p in dense.named_parameters()}
    for name, layer in low_rank_layers(low).items():
        key = next(k for k in (f"{name}.weight".lstrip("."), f"{name}_weight") if k in dense_grads)
        dW = dense_grads[key]
        assert dW is not None
        expected = layer.U.mT.double() @ dW.reshape(layer.m, layer.n) @ layer.Vh.mT.double()
        assert layer.S.grad is not None
        torch.testing.assert_close(layer.S.grad.double(), expected, rtol=1e-4, atol=1e-4)
        if layer.bias is not None:
            assert layer.bias.grad is not None
            bias = dense_grads[f"{name}.bias".lstrip(".")]
            torch.testing.assert_close(layer.bias.grad.double(), bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "crossover"), [("linear", 100.0), ("linear", 1.0), ("conv2d", 100.0), ("attention", 0.0)]
)
def test_export_with_any_batch(kind: str, crossover: float) -> None:
    dense, low, x = twins(kind, torch.float32, "factored")
    for layer in low_rank_layers(low).values():
        layer.crossover = crossover
    got, expected = exported(low, x.float()), dense(torch.cat([x, x.cos(), x]))
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_script_and_symbolic_trace_are_errors_until_merged() -> None:
    _, low, x = twins("linear", torch.float32, "factored")
    with pytest.raises(ModelError, match=r"torch.jit.script cannot compile low-rank layers. Script hpc_oialr.merge"):
        torch.jit.script(low)
    model = nn.Sequential(low)
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(model)
    y, dense = model(x.float()), merge(model)
    torch.testing.assert_close(torch.fx.symbolic_trace(dense)(x.float()), y, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.jit.script(dense)(x.float()), y, rtol=0, atol=1e-5)


def test_derivatives_by_the_core_and_the_bases() -> None:
    """torch.func may differentiate by what is frozen; it is the caller's wish."""
    _, low, x = twins("linear", torch.float32, "factored")
    layer, x = low_rank_layers(low)[""], x.float()
    parameters: dict[str, Any] = {name: p.detach() for name, p in low.named_parameters()}
    got = grad(lambda p: functional_call(low, p, (x,)).square().sum())(parameters)
    y = layer(x).detach()
    U, S, Vh = (p.detach() for p in layer.factors)
    torch.testing.assert_close(got["S"], 2 * U.mT @ y.mT @ x @ Vh.mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got["U"], 2 * y.mT @ x @ Vh.mT @ S.mT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 11), (4, 0)])
@pytest.mark.parametrize("how", ["factored", "merged"])
def test_inputs_that_a_dense_layer_refuses(how: str, shape: tuple[int, int]) -> None:
    _, low, x = twins("linear without bias", torch.float32, how)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        low(torch.randn(shape))
    for wrong in (torch.float64, torch.int64):
        with pytest.raises(RuntimeError, match="same dtype"):
            low(x.to(wrong))


def test_input_by_its_name_and_nested() -> None:
    for kind, name in (("linear", "input"), ("Conv1D", "x"), ("conv1d", "input")):
        dense, low, x = twins(kind, torch.float64, "factored")
        torch.testing.assert_close(low(**{name: x}), dense(**{name: x}))
    dense, low, x = twins("linear", torch.float64, "factored")
    parts = [x, x[:2].cos()]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    for got, part in zip(low(nested).unbind(), parts, strict=True):
        torch.testing.assert_close(got, dense(part))


def test_compiled_whole_after_requires_grad_of_all_parameters() -> None:
    dense, low, x = twins("linear", torch.float32, "factored")
    low.requires_grad_(True)
    y = torch.compile(low, fullgraph=True, backend="eager")(x.float())
    torch.testing.assert_close(y.double(), dense(x), rtol=0, atol=1e-5)
    y.sum().backward()
    layer = low_rank_layers(low)[""]
    assert layer.U.grad is None
    assert layer.S.grad is not None


def test_operations_are_counted_and_shapes_need_no_values() -> None:
    _, low, x = twins("linear", torch.float32, "factored")
    with FlopCounterMode(display=False) as counter:
        low(x.float())
    assert counter.get_total_flops() == 2 * 3 * (12 * 8 + 8 * 8 + 8 * 8)
    assert low.to("meta")(torch.empty(3, 12, device="meta")).shape == (3, 8)
