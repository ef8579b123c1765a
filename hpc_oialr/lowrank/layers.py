"""Low-rank ``nn.Linear``, transformers' ``Conv1D`` (a linear layer with its weight transposed), and convolutions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_oialr.lowrank.base import LowRankWeight
from hpc_oialr.lowrank.factored import factored_linear


class LowRankLinear(LowRankWeight, nn.Linear):  # type: ignore[misc, override]
    """``y = x (U S Vh)^T + b``; autograd keeps ``x Vh^T`` (B x r) instead of ``x`` (B x n) when factored."""

    def forward(self, input: Tensor) -> Tensor:
        """Input (..., n), output (..., m)."""
        if self.shared_input is not None and (y := self.shared_input.output(self, input)) is not None:
            return y
        if not self.factored(_tokens(input)):
            return F.linear(input, self.matrix(), self.bias)
        U, S, Vh = self.matched_factors()
        return factored_linear(input, Vh, S, U, self.bias)


class LowRankConv1D(LowRankWeight):
    """transformers' ``Conv1D``: ``y = x (U S Vh) + b``, the weight is stored input by output."""

    def forward(self, x: Tensor) -> Tensor:
        """Input (..., m), output (..., n)."""
        if not self.factored(_tokens(x)):
            return F.linear(x, self.matrix().mT, self.bias)
        U, S, Vh = self.matched_factors()
        return factored_linear(x, U.mT, S.mT, Vh.mT, self.bias)


def _tokens(x: Tensor) -> int:
    # The lengths of a nested tensor are not in its shape; the factored form serves any number of tokens.
    return 0 if x.is_nested else math.prod(x.shape[:-1])


class LowRankConv(LowRankWeight, nn.modules.conv._ConvNd):  # type: ignore[misc, override]
    """A convolution with kernel ``Vh`` (r filters), then two of extent one: S and U.

    The dense kernel (out x in x extent...) is ``U S Vh`` after flattening to out x rest; groups = 1.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Input (B, in, extents), output (B, out, extents), as the dense layer's."""
        dims = len(self.kernel_size)
        # Output positions of the batch, up to the border: the tokens of the cost formula.
        positions = input.shape[0] if input.dim() > dims + 1 else 1
        for extent, stride in zip(input.shape[-dims:], self.stride, strict=True):
            positions *= -(-extent // stride)
        if not self.factored(positions):
            return self._conv_forward(input, self.matrix().reshape(self.dense_shape), self.bias)
        return self._in_factors(input, *self.matched_factors())

    def _in_factors(self, input: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
        t = self._conv_forward(input, Vh.reshape(self.r, *self.dense_shape[1:]), None)
        return self._channels(self._channels(t, S, None), U, self.bias)

    def _channels(self, t: Tensor, M: Tensor, bias: Tensor | None) -> Tensor:
        """A convolution of extent one."""
        dims = len(self.kernel_size)
        convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[dims - 1]
        return convolve(t, M.reshape(*M.shape, *(1,) * dims), bias)


class LowRankConv1d(LowRankConv, nn.Conv1d):  # type: ignore[misc, override]
    """Low-rank ``nn.Conv1d``."""


class LowRankConv2d(LowRankConv, nn.Conv2d):  # type: ignore[misc, override]
    """Low-rank ``nn.Conv2d``."""


class LowRankConv3d(LowRankConv, nn.Conv3d):  # type: ignore[misc, override]
    """Low-rank ``nn.Conv3d``."""
