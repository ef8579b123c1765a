"""Layers whose weight is sharded over ranks, dense and low-rank, and how a layer becomes one.

``nn.Linear`` (weight out x in) stores rows of the weight, so a block of its outputs; transformers' ``Conv1D`` (in x out)
a block of its inputs. The low-rank forms are the same for both: a block of the inputs times a block of one basis, *one
all-reduce of tokens x r*, the whole core, then a block of the other basis. Kernels of convolutions are small compared
to activations: every rank gathers the kernel and computes the whole layer. A layer is sharded by changing its class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from hpc_oialr.engines.tensor.collectives import copy_to, gather_from, reduce_from, scatter_to
from hpc_oialr.lowrank.base import LowRankWeight
from hpc_oialr.lowrank.layers import LowRankConv1D, LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLinear
from hpc_oialr.lowrank.layout import Sharded, local, whole
from hpc_oialr.lowrank.targets import TargetWeight

LINEAR = ("Linear", "Conv1D")


@dataclass(frozen=True)
class ShardSpec:
    """How a layer is sharded, and its features."""

    layout: Sharded
    input_block: bool  # whether its input is this rank's block of features, or the whole
    output_block: bool  # whether its output is
    dense_class: type[nn.Module]  # of the ordinary layer

    def __deepcopy__(self, memo: Any) -> ShardSpec:
        return self

    def input_part(self, x: Tensor) -> Tensor:
        """This rank's block of the input."""
        return x if self.input_block else scatter_to(x, self.layout)

    def output(self, y: Tensor, n: int, bias: Tensor | None) -> Tensor:
        """The output from its block, plus the bias, which is sharded as the output is."""
        if not self.output_block:
            y = gather_from(y, n, self.layout)
        return y if bias is None else y + local(bias).to(y.dtype)


class ShardedDense(nn.Module):
    """A dense layer with its weight in row blocks."""

    low_rank_attributes: ClassVar[tuple[str, ...]] = ("shard_spec",)
    low_rank_kind: ClassVar[str]
    shard_spec: ShardSpec


class ShardedLinear(ShardedDense, nn.Linear):
    """``y_p = x W_p^T``: each rank computes a block of the outputs from all inputs.

    Forward, an all-gather of the input if it is in blocks, and of the output if it must be whole. Backward, an
    all-reduce of ``dx`` (tokens x n).
    """

    low_rank_kind = "Linear"

    def forward(self, input: Tensor) -> Tensor:
        """Input (..., n or n_p), output (..., m or m_p)."""
        spec, x = self.shard_spec, input
        if spec.input_block:
            x = gather_from(x, self.in_features, spec.layout)
        y = F.linear(copy_to(x, spec.layout), local(self.weight))
        return spec.output(y, self.out_features, self.bias)


class ShardedConv1D(ShardedDense):
    """transformers' ``Conv1D``: ``y = sum_p x_p W_p``, from a block of the inputs.

    Forward, an all-reduce of the output. Backward, an all-gather of ``dx`` if the input was whole, of ``dy`` if
    the output is in blocks.
    """

    low_rank_kind = "Conv1D"
    nf: int
    nx: int
    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Input (..., m or m_p), output (..., n or n_p)."""
        spec = self.shard_spec
        y = reduce_from(F.linear(spec.input_part(x), local(self.weight).mT), spec.layout)
        y = scatter_to(y, spec.layout) if spec.output_block else y
        return y + local(self.bias).to(y.dtype)


class _ShardedConv(ShardedDense, nn.modules.conv._ConvNd):
    """A convolution with its kernel in blocks of output channels."""

    def forward(self, input: Tensor) -> Tensor:
        """As the ordinary layer's; an all-gather of the kernel forward, nothing backward."""
        kernel = cast(DTensor, self.weight).full_tensor()
        return self._conv_forward(input, kernel, self.bias)


class ShardedConv1d(_ShardedConv, nn.Conv1d):
    """See :class:`_ShardedConv`."""

    low_rank_kind = "Conv1d"


class ShardedConv2d(_ShardedConv, nn.Conv2d):
    """See :class:`_ShardedConv`."""

    low_rank_kind = "Conv2d"


class ShardedConv3d(_ShardedConv, nn.Conv3d):
    """See :class:`_ShardedConv`."""

    low_rank_kind = "Conv3d"


class ShardedFactors(LowRankWeight):
    """A low-rank layer with ``U`` in row blocks, ``Vh`` in column blocks and the core whole."""

    shard_spec: ShardSpec

    def matched_factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Replicated factors; a collective call, an all-gather of r (m + n) numbers."""
        self.check_use()
        return self.in_one_dtype(whole(self.U), whole(self.Vh))

    def blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """``U_p`` (m_p x r), ``S``, ``Vh_p`` (r x n_p) in the core's dtype; under autocast as they are."""
        self.check_use()
        return self.in_one_dtype(local(self.U), local(self.Vh))


def through_core(x: Tensor, down: Tensor, core: Tensor, up: Tensor, layout: Sharded) -> Tensor:
    """``up core (sum_p down_p x_p)``: a block of the outputs from a block of the inputs.

    ``x`` is (..., n_p), ``down`` r x n_p, ``core`` the whole r x r, ``up`` m_p x r. Two all-reduces of tokens x r: of
    ``z = sum_p down_p x_p`` forward, of the gradient of ``core z`` backward; so ``dS`` is equal on every rank.
    """
    z = reduce_from(F.linear(x, down), layout)
    return F.linear(copy_to(F.linear(z, core), layout), up)


class ShardedLowRankLinear(ShardedFactors, LowRankLinear):  # type: ignore[misc, override]
    """Low-rank ``nn.Linear`` in blocks; always factored."""

    def forward(self, input: Tensor) -> Tensor:
        """Input (..., n or n_p), output (..., m or m_p)."""
        spec = self.shard_spec
        U, S, Vh = self.blocks()
        return spec.output(through_core(spec.input_part(input), Vh, S, U, spec.layout), self.m, self.bias)


class ShardedLowRankConv1D(ShardedFactors, LowRankConv1D):
    """Low-rank ``Conv1D`` in blocks; always factored."""

    def forward(self, x: Tensor) -> Tensor:
        """Input (..., m or m_p), output (..., n or n_p)."""
        spec = self.shard_spec
        U, S, Vh = self.blocks()
        y = through_core(spec.input_part(x), U.mT, S.mT, Vh.mT, spec.layout)
        return spec.output(y, self.n, self.bias)


class ShardedLowRankConv1d(ShardedFactors, LowRankConv1d):  # type: ignore[misc, override]
    """Low-rank ``nn.Conv1d`` whose bases are gathered for use."""


class ShardedLowRankConv2d(ShardedFactors, LowRankConv2d):  # type: ignore[misc, override]
    """Low-rank ``nn.Conv2d`` whose bases are gathered for use."""


class ShardedLowRankConv3d(ShardedFactors, LowRankConv3d):  # type: ignore[misc, override]
    """Low-rank ``nn.Conv3d`` whose bases are gathered for use."""


DENSE: dict[str, type[ShardedDense]] = {
    kind.low_rank_kind: kind for kind in (ShardedLinear, ShardedConv1D, ShardedConv1d, ShardedConv2d, ShardedConv3d)
}
LOW_RANK: dict[type[LowRankWeight], type[ShardedFactors]] = {
    LowRankLinear: ShardedLowRankLinear,
    LowRankConv1D: ShardedLowRankConv1D,
    LowRankConv1d: ShardedLowRankConv1d,
    LowRankConv2d: ShardedLowRankConv2d,
    LowRankConv3d: ShardedLowRankConv3d,
}


@torch.no_grad()
def shard_dense(target: TargetWeight, layout: Sharded, *, input_block: bool, output_block: bool) -> None:
    """Keep this rank's rows of a replicated dense weight, and of its bias if ``output_block``; see :class:`ShardSpec`."""
    layer = target.holder
    spec = ShardSpec(layout, input_block, output_block, type(layer))
    layer.__class__ = DENSE[target.kind]
    cast(ShardedDense, layer).shard_spec = spec
    for name in ("weight", "bias") if output_block else ("weight",):
        parameter = layer._parameters.get(name)
        if parameter is not None:
            rows = layout.own_rows(parameter.shape[0])
            stored = layout.put(parameter.detach()[rows], 0, parameter.shape)
            layer._parameters[name] = nn.Parameter(stored, requires_grad=parameter.requires_grad)


def shard_low_rank(layer: LowRankWeight) -> None:
    """Let a sharded layer that was just converted compute in blocks."""
    twin = LOW_RANK.get(type(layer))
    if twin is not None:
        layer.__class__ = twin
        layer.dense_class = cast(ShardedFactors, layer).shard_spec.dense_class
