"""Layers between which features may stay split: nothing there looks at more than one block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

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
    Attention's dropout draws the same mask for each process's heads.
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
    heads: int | None = None


def bridges(
    model: nn.Module, pairs: Sequence[ColumnRowPair], targets: Mapping[str, TargetWeight], size: int
) -> list[Bridge]:
    """Where features can stay split into ``size`` equal blocks between layers of ``targets``.

    Parameters
    ----------
    pairs
        What is known of the model; ``nn.Sequential(linear, element-wise, linear)`` is found without.
    targets
        Split linear layers by name.
    """
    found = [*_named(model, pairs), *_sequential(model)]
    return [bridge for bridge in found if _holds(bridge, targets, size)]


def _named(model: nn.Module, pairs: Sequence[ColumnRowPair]) -> Iterator[Bridge]:
    for pair in pairs:
        for name, module in model.named_modules():
            if fnmatchcase(name, pair.parent):
                heads = None if pair.heads is None else getattr(module, pair.heads, 1)
                yield Bridge(tuple(f"{name}.{c}" for c in pair.first), f"{name}.{pair.second}", heads)


def _sequential(model: nn.Module) -> Iterator[Bridge]:
    for name, module in model.named_modules():
        if type(module) is not nn.Sequential:
            continue
        last: str | None = None
        for child, layer in module.named_children():
            if isinstance(layer, ELEMENTWISE):
                continue
            full = f"{name}.{child}" if name else child
            if last is not None:
                yield Bridge((last,), full)
            last = full


def _holds(bridge: Bridge, targets: Mapping[str, TargetWeight], size: int) -> bool:
    if any(name not in targets for name in (*bridge.first, bridge.second)):
        return False
    width = features(targets[bridge.second])[0]
    equal = all(features(targets[name])[1] == width for name in bridge.first)
    return equal and width % size == 0 and (bridge.heads is None or bridge.heads % size == 0)


def features(target: TargetWeight) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    m, n = target.shape
    return (m, n) if target.kind == "Conv1D" else (n, m)
