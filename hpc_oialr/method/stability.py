"""How far a basis has settled; of two bases of any kind: :func:`hpc_oialr.linalg.basis_change.basis_stability`.

All results stay on the device: an update reads them back together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpc_oialr.linalg.basis_change import smallest_cosines


def rotation_stability(P: Tensor, Qh: Tensor) -> Tensor:
    """Stability between ``(U, Vh)`` and its rotation ``(U P, Qh Vh)``: ``sum(P o Qh^T) / r`` (float64, shape ()).

    Not finite if any entry of ``P`` or ``Qh`` is not.
    """
    return (P * Qh.mT).sum(dtype=torch.float64) / int(P.shape[0])


def rotation_cosines(P: Tensor, Qh: Tensor) -> Tensor:
    """Cosines of the largest principal angles of the leading subspaces between ``(U, Vh)`` and ``(U P, Qh Vh)`` (2).

    The bases' Gram products are the rotations themselves. See
    :func:`~hpc_oialr.linalg.basis_change.smallest_cosines`.
    """
    return smallest_cosines(P, Qh.mT)
