"""Low-rank ``nn.Linear`` and transformers' ``Conv1D`` (a linear layer with its weight transposed)."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from hpc_oialr.lowrank.base import LowRankWeight
from hpc_oialr.lowrank.chain import chain


class LowRankLinear(LowRankWeight, nn.Linear):  # type: ignore[misc, override]
    """``y = x (U S Vh)^T + b``; autograd keeps ``x Vh^T`` (B x r) instead of ``x`` (B x n) when factored."""

    in_features: int
    out_features: int

    def forward(self, input: Tensor) -> Tensor:
        """Input (..., n), output (..., m)."""
        if not self.factored(_tokens(input)):
            return F.linear(input, self.matrix(), self.bias)
        U, S, Vh = self.matched_factors(self.S.dtype)
        return chain(input, Vh, S, U, self.bias)


class LowRankConv1D(LowRankWeight):
    """transformers' ``Conv1D``: ``y = x (U S Vh) + b``, the weight is stored input by output."""

    nf: int
    nx: int

    def forward(self, x: Tensor) -> Tensor:
        """Input (..., m), output (..., n)."""
        if not self.factored(_tokens(x)):
            return F.linear(x, self.matrix().mT, self.bias)
        U, S, Vh = self.matched_factors(self.S.dtype)
        return chain(x, U.mT, S.mT, Vh.mT, self.bias)


def _tokens(x: Tensor) -> int:
    # The lengths of a nested tensor are not in its shape; the factored form serves any number of tokens.
    return 0 if x.is_nested else math.prod(x.shape[:-1])
