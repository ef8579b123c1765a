"""From an ordinary layer to a split one, in place, and on to its low-rank form."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from hpc_oialr.engines.tensor.convs import (
    ShardedConv1d,
    ShardedConv2d,
    ShardedConv3d,
    ShardedLowRankConv1d,
    ShardedLowRankConv2d,
    ShardedLowRankConv3d,
)
from hpc_oialr.engines.tensor.layers import (
    ShardedConv1D,
    ShardedDense,
    ShardedFactors,
    ShardedLinear,
    ShardedLowRankConv1D,
    ShardedLowRankLinear,
    ShardSpec,
)
from hpc_oialr.lowrank.base import LowRankWeight
from hpc_oialr.lowrank.layers import LowRankConv1D, LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLinear
from hpc_oialr.lowrank.layout import Sharded
from hpc_oialr.lowrank.targets import TargetWeight

LINEAR = ("Linear", "Conv1D")

DENSE: dict[str, type[ShardedDense]] = {
    kind.low_rank_kind: kind
    for kind in (ShardedLinear, ShardedConv1D, ShardedConv1d, ShardedConv2d, ShardedConv3d)
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
    """Keep this process's rows of a dense weight, and of its bias if it gives a block of its outputs.

    Parameters
    ----------
    target
        A layer that holds the whole weight, equal on all processes.
    input_block, output_block
        As in :class:`ShardSpec`.
    """
    layer = target.holder
    shard_spec = ShardSpec(layout, input_block, output_block, type(layer))
    layer.__class__ = DENSE[target.kind]
    cast(ShardedDense, layer).shard_spec = shard_spec
    _keep_rows(layer, "weight", layout)
    if output_block and layer._parameters.get("bias") is not None:
        _keep_rows(layer, "bias", layout)


def _keep_rows(layer: nn.Module, name: str, layout: Sharded) -> None:
    parameter = layer._parameters[name]
    assert parameter is not None
    rows = layout.own_rows(parameter.shape[0])
    stored = layout.put(parameter.detach()[rows], 0, parameter.shape)
    layer._parameters[name] = nn.Parameter(stored, requires_grad=parameter.requires_grad)


def shard_low_rank(layer: LowRankWeight) -> None:
    """Let a split layer that was just converted compute in blocks."""
    twin = LOW_RANK.get(type(layer))
    if twin is not None:
        layer.__class__ = twin
        layer.dense_class = cast(ShardedFactors, layer).shard_spec.dense_class
