"""Newton-Schulz iteration to the nearest orthogonal matrix, batched."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from hpc_oialr.linalg.arithmetic import without_autocast

# Quintic coefficients with the steepest slope at zero, K. Jordan, "Muon: an optimizer for hidden layers
# in neural networks" (2024): five steps bring singular values from [1e-3, 1] into about [0.7, 1.2].
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPSILON = 1e-7


@without_autocast()
def newton_schulz(G: Tensor, *, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Approximate ``U Vh`` of ``G = U S Vh``; commutes with rotations, ``NS(P^T G Q^T) = P^T NS(G) Q^T``.

    ``2 steps (2 k^2 l + k^3)`` operations a matrix, k the short and l the long side.

    Parameters
    ----------
    G
        One matrix (m x n) or a batch of equal shape (b x m x n).
    steps
        Iterations; 5 is Muon's choice.
    dtype
        Arithmetic, inside autocast too; default float64 for float64, otherwise bfloat16 where the hardware has it,
        else float32.

    Returns
    -------
    Tensor
        Same shape and dtype as ``G``, singular values in about [0.7, 1.2].
    """
    if dtype is None and G.dtype == torch.float64:
        dtype = torch.float64
    elif dtype is None:
        dtype = torch.bfloat16 if G.is_cuda or _fast_bf16_on_cpu() else torch.float32
    X = G.to(dtype)
    tall = G.shape[-2] > G.shape[-1]
    X = X.mT if tall else X
    X = X / (torch.linalg.matrix_norm(X, keepdim=True) + EPSILON)
    a, b, c = COEFFICIENTS
    # beta C + alpha A B in one pass over memory.
    add_product = torch.baddbmm if X.dim() == 3 else torch.addmm
    for _ in range(steps):
        A = X @ X.mT
        X = add_product(X, add_product(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if tall else X).to(G.dtype)


@lru_cache(maxsize=1)
def _fast_bf16_on_cpu() -> bool:
    """Whether this CPU multiplies bf16 in hardware; elsewhere it is emulated and slower than fp32."""
    probes = (
        getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return any(bool(probe()) for probe in probes if probe)
