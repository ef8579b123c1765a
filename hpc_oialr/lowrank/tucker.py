"""Convolutions in Tucker-2 form: bases for the channels only, the core keeps the kernel's extent."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from hpc_oialr.lowrank.base import whole_shape
from hpc_oialr.lowrank.execution import prefer_tucker
from hpc_oialr.lowrank.layers import LowRankConv


class TuckerConv(LowRankConv):
    """A convolution of extent one to ``r_in`` channels, one with the core as its kernel, one of extent one back.

    ``W[o, i, ...] = sum_ab U[o, a] S[a, b, ...] Vh[b, i]``. ``S`` is stored as r_out x (r_in K), K the places of the
    kernel, so that optimizers see the matrix they see of the dense weight. ``r`` is r_out.
    """

    @property
    def columns(self) -> int:
        """Input channels."""
        return int(self.dense_shape[1])

    @property
    def inner(self) -> tuple[int, int]:
        """``(r_out, r_in)``."""
        return self.r, int(whole_shape(self.Vh)[0])

    def _pays(self, tokens: int, crossover: float) -> bool:
        shape = self.m, self.columns, math.prod(self.kernel_size)
        return prefer_tucker(tokens, shape, self.inner, inputs=math.prod(self.stride), crossover=crossover)

    def _in_factors(self, input: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
        t = self._channels(input, Vh, None)
        t = self._conv_forward(t, S.reshape(len(S), len(Vh), *self.kernel_size), None)
        return self._channels(t, U, self.bias)

    def extra_repr(self) -> str:
        """Shape and inner dimensions, as ``print(model)`` shows them."""
        r_out, r_in = self.inner
        return f"m={self.m}, n={self.n}, r_out={r_out}, r_in={r_in}, bias={self.bias is not None}"


class TuckerConv1d(TuckerConv, nn.Conv1d):  # type: ignore[misc, override]
    """``nn.Conv1d`` in Tucker form."""


class TuckerConv2d(TuckerConv, nn.Conv2d):  # type: ignore[misc, override]
    """``nn.Conv2d`` in Tucker form."""


class TuckerConv3d(TuckerConv, nn.Conv3d):  # type: ignore[misc, override]
    """``nn.Conv3d`` in Tucker form."""


def takes_tucker(target: Any, conv: str) -> bool:
    """Whether a target is in Tucker form, or, while it is dense, will be; kernels of extent one have none."""
    if target.low_rank is not None:
        return isinstance(target.low_rank, TuckerConv)
    places = math.prod(target.dense_shape[2:])
    return conv == "tucker" and target.kind in ("Conv1d", "Conv2d", "Conv3d") and places > 1
