"""The products of a factored layer: all kernels give the gradients of three linear layers in a row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hpc_oialr.lowrank import products
from hpc_oialr.lowrank.execution import folds
from hpc_oialr.lowrank.factored import factored_linear
from hpc_oialr.lowrank.products import ONEDNN, TORCH, serving

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


def factors(m: int, n: int, r: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m + n + r)
    A, C = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((r, n), (m, r)))
    S = torch.randn(r, r, generator=generator, dtype=dtype, requires_grad=True)
    return A, S, C, torch.randn(m, generator=generator, dtype=dtype, requires_grad=True)


def three_layers(x: Tensor, A: Tensor, S: Tensor, C: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(F.linear(F.linear(x, A), S), C, bias)


@pytest.mark.parametrize(
    "kernels", [pytest.param(ONEDNN, marks=needs_onednn, id="oneDNN"), pytest.param(TORCH, id="torch")]
)
@pytest.mark.parametrize("shape", [(7,), (3, 5), (4, 5, 6)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("bases_trained", [False, True])
def test_same_as_three_linear_layers(monkeypatch, kernels, shape, transposed, biased, bases_trained):
    monkeypatch.setattr(products, "KERNELS", (ONEDNN, TORCH))  # on any CPU
    dtype = torch.float32 if kernels is ONEDNN else torch.float64
    A, S, C, bias = factors(20, 12, 8, dtype)
    if transposed:  # as transformers' Conv1D stores them
        A, C = A.mT.contiguous().mT, C.mT.contiguous().mT
    x = torch.randn(*shape, 12, dtype=dtype, requires_grad=True)
    used = [
        x,
        S,
        *([bias] if biased else []),
        *((A.requires_grad_(), C.requires_grad_()) if bases_trained else ()),
    ]
    tokens = x.numel() // 12
    assert folds(tokens, 20, 12) == (len(shape) == 3)
    assert serving(x, A, S, C) is (kernels if kernels is ONEDNN or folds(tokens, 20, 12) else None)
    y, expected = (f(x, A, S, C, bias if biased else None) for f in (factored_linear, three_layers))
    dy = torch.randn_like(y)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    ours, theirs = torch.autograd.grad(y, used, dy), torch.autograd.grad(expected, used, dy)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bases_trained", [False, True])
def test_second_derivatives_of_the_folded_form(bases_trained):
    A, S, C, bias = factors(4, 3, 2, torch.float64)
    for basis in (A, C):
        basis.requires_grad_(bases_trained)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert serving(x, A, S, C) is TORCH
    assert torch.autograd.gradgradcheck(factored_linear, (x, A, S, C, bias))


def test_only_what_is_needed():
    A, S, C, bias = factors(8, 6, 8)
    for tokens in (4, 40):
        y = factored_linear(torch.randn(tokens, 6), A, S.detach(), C, bias)
        assert torch.autograd.grad(y.sum(), bias)[0].tolist() == [float(tokens)] * 8
        with torch.no_grad():
            assert not factored_linear(torch.randn(tokens, 6), A, S, C, bias).requires_grad


def test_autocast_gives_the_dtypes_and_values_of_torchs_products():
    A, S, C, bias = factors(24, 16, 8)
    x = torch.randn(64, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = (f(x, A, S, C, bias) for f in (factored_linear, three_layers))
    assert y.dtype == expected.dtype == torch.bfloat16
    off = (y - expected).detach().float().norm() / expected.detach().float().norm()
    assert float(off) < 0.02
    ours, theirs = (torch.autograd.grad(out.float().square().mean(), (x, S, bias)) for out in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert float((a - b).norm() / b.norm()) < 0.03


def test_a_backward_pass_inside_autocast_computes_in_the_dtype_of_the_forward_pass():
    A, S, C, bias = factors(24, 16, 8)
    x, dy = torch.randn(64, 16, requires_grad=True), torch.randn(64, 24)
    y = factored_linear(x, A, S, C, bias)
    expected = torch.autograd.grad(y, (x, S, bias), dy, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y, (x, S, bias), dy)
    assert all(torch.equal(a, b) for a, b in zip(inside, expected, strict=True))


def test_where_torchs_own_products_are_used():
    A, S, C, bias = factors(8, 6, 8)
    x = torch.randn(4, 6)
    assert serving(x.double(), A.double(), S.double(), C.double()) is None, "few tokens, not fp32"
    assert serving(x, *factors(8, 6, 5)[:3]) is None, "of many values of r only some are compiled by oneDNN"
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        assert serving(x, A, S, C) is None
    assert factored_linear(torch.randn(0, 6), A, S, C, bias).shape == (0, 8)


@pytest.mark.parametrize("bases_trained", [False, True])
def test_the_operator_that_compiled_code_calls(bases_trained):
    A, S, C, bias = factors(8, 6, 4)
    for basis in (A, C):
        basis.requires_grad_(bases_trained)
    x = torch.randn(20, 6, requires_grad=True)
    torch.library.opcheck(torch.ops.hpc_oialr.factored_linear.default, (x, A, S, C, bias))
    torch.library.opcheck(torch.ops.hpc_oialr.factored_linear.default, (x, A, S, C, None))
    used = [x, S, bias, *([A, C] if bases_trained else [])]
    y, expected = torch.ops.hpc_oialr.factored_linear(x, A, S, C, bias)[0], three_layers(x, A, S, C, bias)
    ours, theirs = (torch.autograd.grad(out.square().sum(), used) for out in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
