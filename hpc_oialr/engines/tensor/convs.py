"""Convolutions with a split weight: stored in blocks, gathered for use.

Kernels are small beside activations, so every process gathers the kernel and computes the whole layer.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hpc_oialr.engines.tensor.layers import ShardedDense, ShardedFactors
from hpc_oialr.lowrank.layers import LowRankConv1d, LowRankConv2d, LowRankConv3d


class _ShardedConv(ShardedDense, nn.modules.conv._ConvNd):
    def forward(self, input: Tensor) -> Tensor:
        """As the ordinary layer's; an all-gather of the kernel forward, nothing backward."""
        kernel = cast(DTensor, self.weight).full_tensor()
        return self._conv_forward(input, kernel, self.bias)


class ShardedConv1d(_ShardedConv, nn.Conv1d):
    """``nn.Conv1d`` with its kernel in blocks of output channels."""

    low_rank_kind = "Conv1d"


class ShardedConv2d(_ShardedConv, nn.Conv2d):
    """``nn.Conv2d`` with its kernel in blocks of output channels."""

    low_rank_kind = "Conv2d"


class ShardedConv3d(_ShardedConv, nn.Conv3d):
    """``nn.Conv3d`` with its kernel in blocks of output channels."""

    low_rank_kind = "Conv3d"


class ShardedLowRankConv1d(ShardedFactors, LowRankConv1d):  # type: ignore[misc, override]
    """Low-rank ``nn.Conv1d`` whose bases are gathered for use."""


class ShardedLowRankConv2d(ShardedFactors, LowRankConv2d):  # type: ignore[misc, override]
    """Low-rank ``nn.Conv2d`` whose bases are gathered for use."""


class ShardedLowRankConv3d(ShardedFactors, LowRankConv3d):  # type: ignore[misc, override]
    """Low-rank ``nn.Conv3d`` whose bases are gathered for use."""
