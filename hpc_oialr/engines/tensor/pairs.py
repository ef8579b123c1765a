"""Pairs of layers between which features may stay sharded, because nothing there mixes features."""

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

    Attention's dropout uses the same mask for each rank's heads.
    """

    parent: str  # shell pattern over module names
    first: tuple[str, ...]  # the children whose outputs these features are
    second: str  # the child whose input they are
    # The parent's attribute with the number of heads, none of which may be split; None: features are independent.
    heads: str | None = None


def bridges(
    model: nn.Module, pairs: Sequence[ColumnRowPair], targets: Mapping[str, TargetWeight], size: int
) -> list[tuple[tuple[str, ...], str]]:
    """Where features can stay sharded into ``size`` equal blocks: names of the layers before, and of the layer after.

    All are among the sharded linear layers ``targets``. ``pairs`` are the model's known ones; pairs in
    ``nn.Sequential(linear, element-wise, linear)`` are found by themselves.
    """
    found: list[tuple[tuple[str, ...], str, int]] = []
    for pair in pairs:
        for name, module in model.named_modules():
            if fnmatchcase(name, pair.parent):
                first = tuple(f"{name}.{child}" for child in pair.first)
                heads = 0 if pair.heads is None else getattr(module, pair.heads, 1)
                found.append((first, f"{name}.{pair.second}", heads))
    for name, module in model.named_modules():
        if type(module) is nn.Sequential:
            children = module.named_children()
            prefix = f"{name}." if name else ""
            row = [prefix + child for child, layer in children if not isinstance(layer, ELEMENTWISE)]
            found += [((before,), after, 0) for before, after in pairwise(row)]
    features = {
        name: target.shape if target.kind == "Conv1D" else target.shape[::-1] for name, target in targets.items()
    }  # inputs and outputs

    def fits(first: tuple[str, ...], second: str, heads: int) -> bool:
        if not targets.keys() >= {*first, second}:
            return False
        width = features[second][0]
        equal = all(features[name][1] == width for name in first)
        return equal and width % size == 0 and heads % size == 0

    return [(first, second) for first, second, heads in found if fits(first, second, heads)]
