"""Which tensors of a checkpoint are matrices of layers: names and shapes are all that is known of them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from hpc_oialr.errors import DataError
from hpc_oialr.lowrank import Selection
from hpc_oialr.lowrank.attention import PROJECTIONS

# How tables of embeddings are called; by shape alone they may look like a layer.
EMBEDDINGS = ("*embed*", "*wte*", "*wpe*")
# What wrappers put before all names.
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Matrix:
    """One layer's weight.

    Attributes
    ----------
    layer
        Its name, as the selection of a model would call it.
    tensor
        The tensor's name in the checkpoint.
    m, n
        (leading axis) x (all the rest).
    """

    layer: str
    tensor: str
    m: int
    n: int


@dataclass(kw_only=True)
class MatrixSelection(Selection):
    """As :class:`hpc_oialr.lowrank.Selection` for a model, by what a checkpoint tells of it.

    ``kinds`` do not count, embeddings are left out by their names, and the last layer is measured too.
    Grouped convolutions and ties are not recognised.
    """

    exclude: tuple[str, ...] = EMBEDDINGS
    keep_last: bool = False

    def matrices(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Matrix]:
        """Those that take part, with the numbers in their names in order."""
        found = [self._matrix(name, shape) for name, shape in shapes.items()]
        tensors: dict[str, str] = {}
        for each in filter(None, found):
            if tensors.setdefault(each.layer, each.tensor) != each.tensor:
                raise DataError(
                    f"{tensors[each.layer]!r} and {each.tensor!r} are both the weight of layer {each.layer!r}. Leave "
                    "one out of the file."
                )
        kept = sorted((each for each in found if each), key=lambda each: _natural(each.layer))
        return kept[self.keep_first : len(kept) - self.keep_last]

    def _matrix(self, name: str, shape: tuple[int, ...]) -> Matrix | None:
        layer = layer_name(name)
        if layer is None or len(shape) < 2 or 0 in shape or not self.admits(layer):
            return None
        m, n = shape[0], math.prod(shape[1:])
        if min(m, n) < self.min_dim or max(m, n) > self.max_aspect * min(m, n):
            return None
        return Matrix(layer, name, m, n)


def layer_name(tensor: str) -> str | None:
    """The layer that a tensor is the weight of; None for a bias and the like.

    Examples
    --------
    >>> layer_name("module.encoder.0.weight"), layer_name("attn.in_proj_weight"), layer_name("encoder.0.bias")
    ('encoder.0', 'attn.in_proj', None)
    """
    for wrapper in _WRAPPERS:
        tensor = tensor.removeprefix(wrapper)
    layer, _, parameter = tensor.rpartition(".")
    if parameter in PROJECTIONS:
        return f"{layer}.{PROJECTIONS[parameter]}" if layer else PROJECTIONS[parameter]
    return layer if parameter == "weight" else None


def same_matrices(first: list[Matrix], other: list[Matrix], where: tuple[str, str]) -> None:
    """Raise :class:`DataError` unless two checkpoints hold the same layers in the same shapes.

    Parameters
    ----------
    where
        The two checkpoints' paths.
    """
    shapes = ({each.layer: (each.m, each.n) for each in part} for part in (first, other))
    before, now = shapes
    for layer in before | now:
        if before.get(layer) != now.get(layer):
            held = [
                f"{at} holds {_held(part.get(layer))}" for at, part in zip(where, (before, now), strict=True)
            ]
            raise DataError(
                f"layer {layer}: {', '.join(held)}; all checkpoints must be of one model. "
                "Leave it out by --exclude, or analyze them apart."
            )


def _held(shape: tuple[int, int] | None) -> str:
    return "none" if shape is None else f"{shape[0]} x {shape[1]}"


def _natural(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
