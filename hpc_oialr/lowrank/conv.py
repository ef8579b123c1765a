"""Low-rank convolutions: a convolution with kernel ``Vh`` (r filters), then two of extent one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_oialr.lowrank.base import LowRankWeight


class _LowRankConv(LowRankWeight):
    """A convolution whose kernel (out x in x extent...) is ``U S Vh`` after flattening to out x rest."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]
    convolve: Callable[..., Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """Input (B, in, extents), output (B, out, extents), as the dense layer's."""
        if not self.factored(self._positions(input)):
            return self._conv(input, self.matrix().reshape(self.dense_shape), self.bias)
        U, S, Vh = self.matched_factors(self.S.dtype)
        ones = (1,) * len(self.kernel_size)
        t = self._conv(input, Vh.reshape(self.r, *self.dense_shape[1:]), None)
        t = type(self).convolve(t, S.reshape(*S.shape, *ones))
        return type(self).convolve(t, U.reshape(*U.shape, *ones), self.bias)

    def _conv(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return type(self).convolve(x, kernel, bias, self.stride, padding, self.dilation)

    def _positions(self, x: Tensor) -> int:
        """Output positions of the batch, up to the border: the tokens of the cost formula."""
        positions = x.shape[0] if x.dim() > len(self.kernel_size) + 1 else 1
        for extent, stride in zip(x.shape[-len(self.kernel_size) :], self.stride, strict=True):
            positions *= -(-extent // stride)
        return positions


class LowRankConv1d(_LowRankConv, nn.Conv1d):  # type: ignore[misc, override]
    """Low-rank ``nn.Conv1d`` (groups = 1)."""

    convolve = staticmethod(torch.conv1d)


class LowRankConv2d(_LowRankConv, nn.Conv2d):  # type: ignore[misc, override]
    """Low-rank ``nn.Conv2d`` (groups = 1)."""

    convolve = staticmethod(torch.conv2d)


class LowRankConv3d(_LowRankConv, nn.Conv3d):  # type: ignore[misc, override]
    """Low-rank ``nn.Conv3d`` (groups = 1)."""

    convolve = staticmethod(torch.conv3d)
