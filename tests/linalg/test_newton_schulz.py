"""Newton-Schulz: towards orthogonal, one matrix or a batch, and it commutes with rotations."""

from __future__ import annotations

import pytest
import torch

from hpc_oialr.linalg.newton_schulz import newton_schulz


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
