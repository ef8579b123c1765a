"""Newton-Schulz iteration to the nearest orthogonal matrix, batched."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from hpc_oialr.linalg.arithmetic import tf32_products, without_autocast

Precision = torch.dtype | Literal["tf32"] | None

# Quintic coefficients with the steepest slope at zero, K. Jordan, "Muon: an optimizer for hidden layers
# in neural networks" (2024): five steps bring singular values from [1e-3, 1] into about [0.7, 1.2].
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPSILON = 1e-7
# On a GPU sides are padded to a multiple of this: few batches, and no thin tiles or unaligned rows.
GPU_MULTIPLE = 64


@without_autocast()
def newton_schulz(G: Tensor, *, steps: int = 5, dtype: Precision = None) -> Tensor:
    """Approximate ``U Vh`` of ``G = U S Vh``; commutes with rotations, ``NS(P^T G Q^T) = P^T NS(G) Q^T``.

    ``2 steps (2 k^2 l + k^3)`` operations a matrix, k the short, l the long side. bfloat16 moves the result by 1 to 6 %
    of its norm, float32 by less than 1e-5, but neither away from ``U Vh``: that distance, .2 to .4 of the norm, stays
    the same to .003 (square matrices of 64 to 384, Gaussian or with singular values from 1 down to 1e-3).

    Parameters
    ----------
    G
        One matrix (m x n) or a batch of equal shape (b x m x n).
    steps
        Iterations; 5 is Muon's choice.
    dtype
        Arithmetic, inside autocast too; default float64 for float64, otherwise bfloat16 where the hardware has it,
        else float32. "tf32" is float32 whose products CUDA may compute in TF32, whatever torch's switch says.

    Returns
    -------
    Tensor
        Same shape and dtype as ``G``, singular values in about [0.7, 1.2].
    """
    if dtype == "tf32":
        with tf32_products(True):
            return newton_schulz(G, steps=steps, dtype=torch.float32)
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


def newton_schulz_each(
    weights: Sequence[Tensor], *, steps: int = 5, dtype: Precision = None, multiple: int | None = None
) -> list[Tensor]:
    """:func:`newton_schulz` of weights of any shapes, one batch for all of a size class.

    Zeros fill each matrix up to its class. They change nothing but the order of sums: the norm stays, and in the
    iteration's products zero rows and columns stay zero.

    Parameters
    ----------
    weights
        m x n each; one with more axes counts as (leading axis) x (all the rest).
    steps, dtype
        As :func:`newton_schulz`'s.
    multiple
        A size class is both sides rounded up to this; default 64 on a GPU, 1 (no padding) elsewhere.

    Returns
    -------
    list of Tensor
        Contiguous, of the weights' shapes and dtypes.
    """
    matrices = [weight.reshape(weight.shape[0], -1) for weight in weights]
    classes: defaultdict[tuple[int, int, torch.device, torch.dtype], list[int]] = defaultdict(list)
    for i, matrix in enumerate(matrices):
        unit = multiple or (GPU_MULTIPLE if matrix.is_cuda else 1)
        m, n = (-(-side // unit) * unit for side in matrix.shape)
        classes[m, n, matrix.device, matrix.dtype].append(i)
    for (m, n, *_), members in classes.items():
        chosen = [matrices[i] for i in members]
        if all(matrix.shape == (m, n) for matrix in chosen):
            batch = torch.stack(chosen)
        else:
            batch = chosen[0].new_zeros(len(chosen), m, n)
            torch._foreach_copy_([_corner(*pair) for pair in zip(batch.unbind(), chosen, strict=True)], chosen)
        done = newton_schulz(batch, steps=steps, dtype=dtype)
        for i, result in zip(members, done.unbind(), strict=True):
            # Contiguous: others go through foreach's slow path, one by one.
            matrices[i] = _corner(result, matrices[i]).flatten()
    return [result.view_as(weight) for result, weight in zip(matrices, weights, strict=True)]


def _corner(padded: Tensor, matrix: Tensor) -> Tensor:
    """The part of ``padded`` that ``matrix`` fills, a view."""
    return padded.narrow(0, 0, matrix.shape[0]).narrow(1, 0, matrix.shape[1])


@lru_cache(maxsize=1)
def _fast_bf16_on_cpu() -> bool:
    """Whether this CPU multiplies bf16 in hardware; elsewhere it is emulated and slower than fp32."""
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(bool(probe()) for probe in probes if probe)
