"""How far a basis has settled; of two bases of any kind: :func:`hpc_oialr.linalg.blocks.basis_stability`."""

from __future__ import annotations

import torch
from torch import Tensor


def rotation_stability(P: Tensor, Qh: Tensor) -> float:
    """Stability between ``(U, Vh)`` and its rotation ``(U P, Qh Vh)``: ``sum(P o Qh^T) / r``."""
    product = (P * Qh.mT).sum(dtype=torch.float64)
    return float(product) / int(P.shape[0])
