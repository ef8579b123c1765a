"""Layers whose weight is split over processes: dense and low-rank forms of the same layer.

``nn.Linear`` (weight out x in) holds rows of the weight, that is, a block of its outputs; transformers'
``Conv1D`` (in x out) a block of its inputs. The low-rank forms are the same for both: a block of the inputs
times a block of one basis, *one all-reduce of tokens x r*, the whole core, then a block of the other basis.

Every class is put on a living layer in place of its ordinary one, like the low-rank classes themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_oialr.engines.tensor.collectives import copy_to, gather_from, reduce_from, scatter_to
from hpc_oialr.lowrank.base import LowRankWeight
from hpc_oialr.lowrank.layers import LowRankConv1D, LowRankLinear
from hpc_oialr.lowrank.layout import Sharded, local, whole


@dataclass(frozen=True)
class ShardSpec:
    """How a sharded layer is split, and what its neighbours give and take.

    Attributes
    ----------
    layout
        How its matrices are split.
    input_block, output_block
        Whether it takes and gives this process's block of features, or the whole.
    dense_class
        The layer's class when it is neither split nor low-rank.
    """

    layout: Sharded
    input_block: bool
    output_block: bool
    dense_class: type[nn.Module]

    def __deepcopy__(self, memo: Any) -> ShardSpec:
        return self

    def input_part(self, x: Tensor) -> Tensor:
        """This process's block of the input."""
        return x if self.input_block else scatter_to(x, self.layout)

    def whole_input(self, x: Tensor, n: int) -> Tensor:
        """The whole input (..., n), of which this process uses all for a part of the work."""
        return copy_to(gather_from(x, n, self.layout) if self.input_block else x, self.layout)

    def output(self, y: Tensor, n: int, bias: Tensor | None) -> Tensor:
        """The output from its block, biased; the bias is stored as the output is."""
        if not self.output_block:
            y = gather_from(y, n, self.layout)
        return y if bias is None else y + local(bias).to(y.dtype)


class ShardedDense(nn.Module):
    """A dense layer with its weight in row blocks; subclasses name the kind of the ordinary layer."""

    low_rank_attributes: ClassVar[tuple[str, ...]] = ("shard_spec",)
    low_rank_kind: ClassVar[str]
    shard_spec: ShardSpec


class ShardedLinear(ShardedDense, nn.Linear):
    """``y_p = x W_p^T``: each process computes a block of the outputs from all inputs.

    Forward, an all-gather of the input if it is in blocks, and of the output if it must be whole. Backward,
    an all-reduce of ``dx`` (tokens x n).
    """

    low_rank_kind = "Linear"

    def forward(self, input: Tensor) -> Tensor:
        """Input (..., n or n_p), output (..., m or m_p)."""
        spec = self.shard_spec
        return spec.output(
            F.linear(spec.whole_input(input, self.in_features), local(self.weight)),
            self.out_features,
            self.bias,
        )


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


class ShardedFactors(LowRankWeight):
    """A low-rank layer with ``U`` in row blocks, ``Vh`` in column blocks and the core whole."""

    shard_spec: ShardSpec

    def matched_factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Replicated factors; a collective call, an all-gather of r (m + n) numbers."""
        self.check_use()
        return self.in_dtype(dtype, whole(self.U), self.S, whole(self.Vh))

    def blocks(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """``U_p`` (m_p x r), ``S``, ``Vh_p`` (r x n_p) in one dtype; under autocast as they are."""
        self.check_use()
        return self.in_dtype(dtype, local(self.U), self.S, local(self.Vh))


def through_core(x: Tensor, down: Tensor, core: Tensor, up: Tensor, layout: Sharded) -> Tensor:
    """``up core (sum_p down_p x_p)``: a block of the outputs from a block of the inputs.

    Parameters
    ----------
    x
        (..., n_p).
    down, core, up
        This process's r x n_p, the whole r x r, this process's m_p x r.

    Notes
    -----
    Two all-reduces of tokens x r: of ``z = sum_p down_p x_p`` forward, and of the gradient of ``core z``
    backward. Both are whole afterwards, and so ``dS`` is the same on every process without more traffic.
    """
    z = reduce_from(F.linear(x, down), layout)
    return F.linear(copy_to(F.linear(z, core), layout), up)


class ShardedLowRankLinear(ShardedFactors, LowRankLinear):  # type: ignore[misc, override]
    """Low-rank ``nn.Linear`` in blocks; always factored."""

    def forward(self, input: Tensor) -> Tensor:
        """Input (..., n or n_p), output (..., m or m_p)."""
        spec = self.shard_spec
        U, S, Vh = self.blocks(self.S.dtype)
        return spec.output(through_core(spec.input_part(input), Vh, S, U, spec.layout), self.m, self.bias)


class ShardedLowRankConv1D(ShardedFactors, LowRankConv1D):
    """Low-rank ``Conv1D`` in blocks; always factored."""

    def forward(self, x: Tensor) -> Tensor:
        """Input (..., m or m_p), output (..., n or n_p)."""
        spec = self.shard_spec
        U, S, Vh = self.blocks(self.S.dtype)
        return spec.output(
            through_core(spec.input_part(x), U.mT, S.mT, Vh.mT, spec.layout), self.n, self.bias
        )
