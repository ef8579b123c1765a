"""The products of a factored layer: oneDNN's and torch's own give the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hpc_oialr.lowrank.execution import factored_linear, onednn_fits

onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


def factors(m: int, n: int, r: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m + n + r)
    A, C = torch.randn(r, n, generator=generator), torch.randn(m, r, generator=generator)
    S = torch.randn(r, r, generator=generator, requires_grad=True)
    return A, S, C, torch.randn(m, generator=generator, requires_grad=True)


@onednn
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_same_as_three_linear_layers(shape, transposed, biased):
    A, S, C, bias = factors(20, 12, 8)
    if transposed:  # as transformers' Conv1D stores them
        A, C = A.mT.contiguous().mT, C.mT.contiguous().mT
    x = torch.randn(*shape, 12, requires_grad=True)
    used = [x, S, bias] if biased else [x, S]
    assert onednn_fits(x, A, S, C)
    y = factored_linear(x, A, S, C, bias if biased else None)
    expected = F.linear(F.linear(F.linear(x, A), S), C, bias if biased else None)
    dy = torch.randn_like(y)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    ours, theirs = torch.autograd.grad(y, used, dy), torch.autograd.grad(expected, used, dy)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@onednn
def test_only_what_is_needed():
    A, S, C, bias = factors(8, 6, 8)
    y = factored_linear(torch.randn(4, 6), A, S.detach(), C, bias)
    assert torch.autograd.grad(y.sum(), bias)[0].tolist() == [4.0] * 8
    with torch.no_grad():
        assert not factored_linear(torch.randn(4, 6), A, S, C, bias).requires_grad


def test_where_torchs_own_products_are_used():
    A, S, C, bias = factors(8, 6, 8)
    x = torch.randn(4, 6)
    assert not onednn_fits(x.double(), A.double(), S.double(), C.double())
    assert not onednn_fits(x, A.clone().requires_grad_(), S, C)
    assert not onednn_fits(torch.randn(0, 6), A, S, C)
    assert not onednn_fits(x, *factors(8, 6, 5)[:3]), "of many values of r only some are compiled"
    with torch.autocast("cpu", torch.bfloat16):
        assert not onednn_fits(x, A, S, C)
    assert factored_linear(torch.randn(0, 6), A, S, C, bias).shape == (0, 8)
