"""Convolutions with a split weight: stored in blocks, gathered for use.

Kernels are small beside activations, so every process gathers the kernel and computes the whole layer.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hpc_oialr.lowrank.conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from hpc_oialr.lowrank.split_layers import SplitDense, SplitFactors


class _SplitConv(SplitDense, nn.modules.conv._ConvNd):
    def forward(self, input: Tensor) -> Tensor:
        """As the ordinary layer's; an all-gather of the kernel forward, nothing backward."""
        kernel = cast(DTensor, self.weight).full_tensor()
        return self._conv_forward(input, kernel, self.bias)


class SplitConv1d(_SplitConv, nn.Conv1d):
    """``nn.Conv1d`` with its kernel in blocks of output channels."""

    kind = "Conv1d"


class SplitConv2d(_SplitConv, nn.Conv2d):
    """``nn.Conv2d`` with its kernel in blocks of output channels."""

    kind = "Conv2d"


class SplitConv3d(_SplitConv, nn.Conv3d):
    """``nn.Conv3d`` with its kernel in blocks of output channels."""

    kind = "Conv3d"


class SplitLowRankConv1d(SplitFactors, LowRankConv1d):  # type: ignore[misc, override]
    """Low-rank ``nn.Conv1d`` whose bases are gathered for use."""


class SplitLowRankConv2d(SplitFactors, LowRankConv2d):  # type: ignore[misc, override]
    """Low-rank ``nn.Conv2d`` whose bases are gathered for use."""


class SplitLowRankConv3d(SplitFactors, LowRankConv3d):  # type: ignore[misc, override]
    """Low-rank ``nn.Conv3d`` whose bases are gathered for use."""
