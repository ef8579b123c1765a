"""Newton-Schulz: towards orthogonal, one matrix or a batch, and it commutes with rotations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hpc_oialr.linalg.newton_schulz import newton_schulz, newton_schulz_each
from hpc_oialr.torch_compat import TorchDispatchMode


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24)])
def test_singular_values_move_to_about_one(shape: tuple[int, int]) -> None:
    G = torch.randn(*shape, dtype=torch.float64)
    s = torch.linalg.svdvals(newton_schulz(G))
    assert s.min() > 0.6
    assert s.max() < 1.25


def test_batch_equals_one_by_one() -> None:
    G = torch.randn(3, 12, 7, dtype=torch.float64)
    single = torch.stack([newton_schulz(g) for g in G])
    torch.testing.assert_close(newton_schulz(G), single, rtol=0, atol=1e-12)


def test_agrees_with_torch_muon() -> None:
    from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, _zeropower_via_newtonschulz

    G = torch.randn(24, 16)
    theirs = _zeropower_via_newtonschulz(G, (DEFAULT_A, DEFAULT_B, DEFAULT_C), 5, 1e-7)
    ours = newton_schulz(G, dtype=torch.bfloat16)
    assert (ours - theirs.float()).abs().max() < 0.05
    torch.testing.assert_close(newton_schulz(G, dtype=torch.float32), ours, rtol=0, atol=0.05)


def test_commutes_with_rotations() -> None:
    G = torch.randn(10, 10, dtype=torch.float64)
    P, Q = (torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64)).Q for _ in range(2))
    torch.testing.assert_close(newton_schulz(P.mT @ G @ Q), P.mT @ newton_schulz(G) @ Q, rtol=0, atol=1e-9)


UNEQUAL = [(5, 5), (8, 8), (7, 6), (3, 2, 2), (20, 5), (1, 1)]


@pytest.mark.parametrize("multiple", [8, 64])
def test_padding_leaves_the_result_unchanged(multiple: int) -> None:
    weights = [torch.randn(shape) for shape in UNEQUAL]
    padded = newton_schulz_each(weights, dtype=torch.float32, multiple=multiple)
    for weight, result in zip(weights, padded, strict=True):
        alone = newton_schulz(weight.flatten(1), dtype=torch.float32).view_as(weight)
        torch.testing.assert_close(result, alone, rtol=0, atol=1e-5)
        assert result.is_contiguous()
    double = newton_schulz_each([weight.double() for weight in weights], multiple=multiple)
    exact = newton_schulz_each([weight.double() for weight in weights])
    torch.testing.assert_close(double, exact, rtol=0, atol=1e-13)


def test_without_a_gpu_nothing_is_padded() -> None:
    weights = [torch.randn(shape) for shape in [*UNEQUAL, (5, 5)]]
    results = newton_schulz_each(weights)
    pair = newton_schulz(torch.stack([weights[0], weights[-1]]))
    assert torch.equal(torch.stack([results[0], results[-1]]), pair)
    for weight, result in list(zip(weights, results, strict=True))[1:-1]:
        assert torch.equal(result.flatten(1), newton_schulz(weight.flatten(1)[None])[0])


@pytest.mark.parametrize("k", [64, 192, 384])
@pytest.mark.parametrize("decaying", [False, True])
def test_low_precision_moves_the_result_but_not_away_from_orthogonal(k: int, decaying: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(k, k, dtype=torch.float64, generator=generator)
    if decaying:
        U, _, Vh = torch.linalg.svd(G)
        G = U * torch.logspace(0, -3, k, dtype=torch.float64) @ Vh
    exact = newton_schulz(G)
    U, _, Vh = torch.linalg.svd(G)

    def distance(X: torch.Tensor, Y: torch.Tensor) -> float:
        return float((X - Y).norm() / Y.norm())

    for dtype, least, most in ((torch.float32, 0, 1e-5), (torch.bfloat16, 0.01, 0.06)):
        moved = newton_schulz(G, dtype=dtype)
        assert least <= distance(moved, exact) < most
        assert distance(moved, U @ Vh) == pytest.approx(distance(exact, U @ Vh), abs=3e-3)


def test_tf32_is_allowed_for_the_products_only() -> None:
    matmul = torch.backends.cuda.matmul
    before, seen = matmul.fp32_precision, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(matmul.fp32_precision)
            return func(*args, **(kwargs or {}))

    G = torch.randn(6, 6)
    with Watch():
        result = newton_schulz(G, dtype="tf32")
    assert set(seen) == {"tf32"}
    assert matmul.fp32_precision == before
    assert torch.equal(result, newton_schulz(G, dtype=torch.float32))
