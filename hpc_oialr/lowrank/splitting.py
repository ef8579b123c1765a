"""From an ordinary layer to a split one, in place, and on to its low-rank form."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from hpc_oialr.lowrank.base import LowRankWeight
from hpc_oialr.lowrank.conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from hpc_oialr.lowrank.layout import Split
from hpc_oialr.lowrank.linear import LowRankConv1D, LowRankLinear
from hpc_oialr.lowrank.selection import Site
from hpc_oialr.lowrank.split_conv import (
    SplitConv1d,
    SplitConv2d,
    SplitConv3d,
    SplitLowRankConv1d,
    SplitLowRankConv2d,
    SplitLowRankConv3d,
)
from hpc_oialr.lowrank.split_layers import (
    Ports,
    SplitConv1D,
    SplitDense,
    SplitFactors,
    SplitLinear,
    SplitLowRankConv1D,
    SplitLowRankLinear,
)

LINEAR = ("Linear", "Conv1D")

DENSE: dict[str, type[SplitDense]] = {
    kind.kind: kind for kind in (SplitLinear, SplitConv1D, SplitConv1d, SplitConv2d, SplitConv3d)
}

LOW_RANK: dict[type[LowRankWeight], type[SplitFactors]] = {
    LowRankLinear: SplitLowRankLinear,
    LowRankConv1D: SplitLowRankConv1D,
    LowRankConv1d: SplitLowRankConv1d,
    LowRankConv2d: SplitLowRankConv2d,
    LowRankConv3d: SplitLowRankConv3d,
}


@torch.no_grad()
def split_dense(site: Site, layout: Split, *, input_block: bool, output_block: bool) -> None:
    """Keep this process's rows of a dense weight, and of its bias if it gives a block of its outputs.

    Parameters
    ----------
    site
        A layer that holds the whole weight, equal on all processes.
    input_block, output_block
        As in :class:`Ports`.
    """
    layer = site.holder
    ports = Ports(layout, input_block, output_block, type(layer))
    layer.__class__ = DENSE[site.kind]
    cast(SplitDense, layer).ports = ports
    _keep_rows(layer, "weight", layout)
    if output_block and layer._parameters.get("bias") is not None:
        _keep_rows(layer, "bias", layout)


def _keep_rows(layer: nn.Module, name: str, layout: Split) -> None:
    parameter = layer._parameters[name]
    assert parameter is not None
    rows = layout.own_rows(parameter.shape[0])
    stored = layout.put(parameter.detach()[rows], 0, parameter.shape)
    layer._parameters[name] = nn.Parameter(stored, requires_grad=parameter.requires_grad)


def split_low_rank(layer: LowRankWeight) -> None:
    """Let a split layer that was just converted compute in blocks."""
    twin = LOW_RANK.get(type(layer))
    if twin is not None:
        layer.__class__ = twin
        layer.dense_class = cast(SplitFactors, layer).ports.dense_class
