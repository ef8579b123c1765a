"""How far a basis has settled."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def stability(U1: Tensor, Vh1: Tensor, U2: Tensor, Vh2: Tensor) -> float:
    """Agreement of two bases of one weight: ``<U1 Vh1, U2 Vh2>_F / sqrt(r1 r2)``.

    Computed as ``sum((U1^T U2) o (Vh1 Vh2^T)) / sqrt(r1 r2)``, two Gram products of r1 x r2 numbers;
    nothing of size m x n is built. 1 = same basis, about 0 = unrelated. Signs of singular vectors,
    which are arbitrary in pairs, do not matter.

    Parameters
    ----------
    U1, Vh1
        m x r1 and r1 x n.
    U2, Vh2
        m x r2 and r2 x n.

    References
    ----------
    arXiv 2401.08505, section 3 (there r1 = r2 = k).
    """
    product = ((U1.mT @ U2) * (Vh1 @ Vh2.mT)).sum(dtype=torch.float64)
    return float(product) / math.sqrt(U1.shape[1] * U2.shape[1])


def rotation_stability(P: Tensor, Qh: Tensor) -> float:
    """Stability between ``(U, Vh)`` and its rotation ``(U P, Qh Vh)``: ``sum(P o Qh^T) / r``."""
    product = (P * Qh.mT).sum(dtype=torch.float64)
    return float(product) / int(P.shape[0])
