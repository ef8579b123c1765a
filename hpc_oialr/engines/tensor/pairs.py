"""Layers between which features may stay split: nothing there uses more than one block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise

from torch import nn

from hpc_oialr.lowrank.targets import TargetWeight

ELEMENTWISE = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.Mish,
    nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Tanh,
)  # fmt: skip


@dataclass(frozen=True)
class ColumnRowPair:
    """Children of one module, with an element-wise function or attention between them.

    Parameters
    ----------
    parent
        Shell pattern over module names.
    first
        Names of the children that give features.
    second
        Name of the child that takes them.
    heads
        Attribute of the parent with the number of heads, which must not be cut; None: features are independent.

    Notes
    -----
    Attention's dropout draws the same mask for each rank's heads.
    """

    parent: str
    first: tuple[str, ...]
    second: str
    heads: str | None = None


@dataclass(frozen=True)
class Bridge:
    """One place of a model where features stay split: full names of the layers before and after."""

    first: tuple[str, ...]
    second: str
    heads: int = 0


def bridges(
    model: nn.Module, pairs: Sequence[ColumnRowPair], targets: Mapping[str, TargetWeight], size: int
) -> list[Bridge]:
    """Where features can stay split into ``size`` equal blocks between the split linear layers ``targets``.

    ``pairs`` is what is known of the model; ``nn.Sequential(linear, element-wise, linear)`` is found without.
    """
    found: list[Bridge] = []
    for pair in pairs:
        for name, module in model.named_modules():
            if fnmatchcase(name, pair.parent):
                first = tuple(f"{name}.{child}" for child in pair.first)
                heads = 0 if pair.heads is None else getattr(module, pair.heads, 1)
                found.append(Bridge(first, f"{name}.{pair.second}", heads))
    for name, module in model.named_modules():
        if type(module) is nn.Sequential:
            children = module.named_children()
            prefix = f"{name}." if name else ""
            row = [prefix + child for child, layer in children if not isinstance(layer, ELEMENTWISE)]
            found += [Bridge((before,), after) for before, after in pairwise(row)]

    def fits(bridge: Bridge) -> bool:
        if not targets.keys() >= {*bridge.first, bridge.second}:
            return False
        width = features(targets[bridge.second])[0]
        equal = all(features(targets[name])[1] == width for name in bridge.first)
        return equal and width % size == 0 and bridge.heads % size == 0

    return [bridge for bridge in found if fits(bridge)]


def features(target: TargetWeight) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    m, n = target.shape
    return (m, n) if target.kind == "Conv1D" else (n, m)
