"""How far a basis has settled; of two bases of any kind: :func:`hpc_oialr.linalg.blocks.basis_stability`."""

from __future__ import annotations

import torch
from torch import Tensor

from hpc_oialr.linalg.basis_change import largest_angles


def rotation_stability(P: Tensor, Qh: Tensor) -> float:
    """Stability between ``(U, Vh)`` and its rotation ``(U P, Qh Vh)``: ``sum(P o Qh^T) / r``."""
    product = (P * Qh.mT).sum(dtype=torch.float64)
    return float(product) / int(P.shape[0])


def rotation_angles(P: Tensor, Qh: Tensor) -> tuple[float, float]:
    """Largest principal angles of the leading subspaces between ``(U, Vh)`` and ``(U P, Qh Vh)`` (rad).

    The bases' Gram products are the rotations themselves. See
    :func:`~hpc_oialr.linalg.basis_change.largest_angles`.
    """
    angle_U, angle_Vh = largest_angles(P, Qh.mT)
    return angle_U, angle_Vh
