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

from hpc_oialr.lowrank.base import LowRankWeight
from hpc_oialr.lowrank.layout import Split, local
from hpc_oialr.lowrank.layout import whole as all_of
from hpc_oialr.lowrank.linear import LowRankConv1D, LowRankLinear
from hpc_oialr.lowrank.split_exchange import block, shared, total, whole


@dataclass(frozen=True)
class Ports:
    """How a split layer meets its neighbours.

    Attributes
    ----------
    layout
        How its matrices are split.
    input_block, output_block
        Whether it takes and gives this process's block of features, or the whole.
    dense_class
        The layer's class when it is neither split nor low-rank.
    """

    layout: Split
    input_block: bool
    output_block: bool
    dense_class: type[nn.Module]

    def __deepcopy__(self, memo: Any) -> Ports:
        return self

    def block(self, x: Tensor) -> Tensor:
        """The input's block."""
        return x if self.input_block else block(x, self.layout)

    def whole(self, x: Tensor, n: int) -> Tensor:
        """The whole input (..., n), of which this process uses all for a part of the work."""
        return shared(whole(x, n, self.layout) if self.input_block else x, self.layout)

    def close(self, y: Tensor, n: int, bias: Tensor | None) -> Tensor:
        """The output from its block, biased; the bias is stored as the output is."""
        if not self.output_block:
            y = whole(y, n, self.layout)
        return y if bias is None else y + local(bias).to(y.dtype)


class SplitDense(nn.Module):
    """A dense layer with its weight in row blocks."""

    kind: ClassVar[str]
    ports: Ports


class SplitLinear(SplitDense, nn.Linear):
    """``y_p = x W_p^T``: each process computes a block of the outputs from all inputs.

    Forward, an all-gather of the input if it is in blocks, and of the output if it must be whole. Backward,
    an all-reduce of ``dx`` (tokens x n).
    """

    kind = "Linear"

    def forward(self, input: Tensor) -> Tensor:
        """Input (..., n or n_p), output (..., m or m_p)."""
        ports = self.ports
        return ports.close(
            F.linear(ports.whole(input, self.in_features), local(self.weight)), self.out_features, self.bias
        )


class SplitConv1D(SplitDense):
    """transformers' ``Conv1D``: ``y = sum_p x_p W_p``, from a block of the inputs.

    Forward, an all-reduce of the output. Backward, an all-gather of ``dx`` if the input was whole, of ``dy`` if
    the output is in blocks.
    """

    kind = "Conv1D"
    nf: int
    nx: int
    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Input (..., m or m_p), output (..., n or n_p)."""
        ports = self.ports
        y = total(F.linear(ports.block(x), local(self.weight).mT), ports.layout)
        y = block(y, ports.layout) if ports.output_block else y
        return y + local(self.bias).to(y.dtype)


class SplitFactors(LowRankWeight):
    """A low-rank layer with ``U`` in row blocks, ``Vh`` in column blocks and the core whole."""

    ports: Ports

    def matched_factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Whole factors; a collective call, an all-gather of r (m + n) numbers."""
        self.check_use()
        return self.in_dtype(dtype, all_of(self.U), self.S, all_of(self.Vh))

    def blocks(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """``U_p`` (m_p x r), ``S``, ``Vh_p`` (r x n_p) in one dtype; under autocast as they are."""
        self.check_use()
        return self.in_dtype(dtype, local(self.U), self.S, local(self.Vh))


def through_core(x: Tensor, down: Tensor, core: Tensor, up: Tensor, layout: Split) -> Tensor:
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
    z = total(F.linear(x, down), layout)
    return F.linear(shared(F.linear(z, core), layout), up)


class SplitLowRankLinear(SplitFactors, LowRankLinear):  # type: ignore[misc, override]
    """Low-rank ``nn.Linear`` in blocks; always factored."""

    def forward(self, input: Tensor) -> Tensor:
        """Input (..., n or n_p), output (..., m or m_p)."""
        ports = self.ports
        U, S, Vh = self.blocks(self.S.dtype)
        return ports.close(through_core(ports.block(input), Vh, S, U, ports.layout), self.m, self.bias)


class SplitLowRankConv1D(SplitFactors, LowRankConv1D):
    """Low-rank ``Conv1D`` in blocks; always factored."""

    def forward(self, x: Tensor) -> Tensor:
        """Input (..., m or m_p), output (..., n or n_p)."""
        ports = self.ports
        U, S, Vh = self.blocks(self.S.dtype)
        return ports.close(through_core(ports.block(x), U.mT, S.mT, Vh.mT, ports.layout), self.n, self.bias)
