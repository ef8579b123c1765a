"""What one measurement, conversion or update did."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from hpc_oialr.linalg.svd import compute_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from hpc_oialr.lowrank import TargetWeight

Kind = Literal["stability", "conversion", "update"]


@dataclass(frozen=True)
class ChannelUpdate:
    """What was done to a Tucker layer's input channels, ``n`` of them; ``singular_values`` before the cut (fp32, CPU)."""

    n: int
    r_before: int
    r: int
    singular_values: Tensor


@dataclass(frozen=True, kw_only=True)
class LayerUpdate:
    """What was done to one layer.

    Attributes
    ----------
    name, m, n
        The layer and its weight's shape.
    r_before, r
        Inner dimension before and after; k while the weight is dense.
    singular_values
        All values before the cut, descending (fp32, CPU).
    stability
        Agreement with the previous basis; None if there is none.
    orthogonality_error_U, orthogonality_error_Vh
        ``||Q^T Q - I||_F / sqrt(r)`` before this update; 0 while dense.
    seconds
        Time of the SVD on a rank that computed it (s); 0 on the others.
    subspace_angle_U, subspace_angle_Vh
        Largest principal angle between the leading quarters of this and the previous basis (rad); None if there is
        none. See :func:`~hpc_oialr.linalg.basis_change.smallest_cosines`.
    r_factor_distance
        ``||R' - R||_F / ||R||_F``, with R of the weight's previous QR and R' the new one; None if there is none, and
        once the weight is low-rank.
    new_directions
        How many joined the bases after the cut; over r it is the share of the bases that is new.
    cut_share
        Where second moments were gathered: the share of ``E ||y||^2`` of the layer's outputs that the cut takes, with
        gradients of the second-order estimate of their effect on the loss; None elsewhere.
    input_channels
        Of a convolution in Tucker form, where r and the values above are those of its output channels; None elsewhere.
    """

    name: str
    m: int
    n: int
    r_before: int
    r: int
    singular_values: Tensor
    stability: float | None = None
    orthogonality_error_U: float = 0.0
    orthogonality_error_Vh: float = 0.0
    seconds: float
    subspace_angle_U: float | None = None
    subspace_angle_Vh: float | None = None
    r_factor_distance: float | None = None
    cut_share: float | None = None
    new_directions: int = 0
    input_channels: ChannelUpdate | None = None

    @property
    def cut_values(self) -> int:
        """How many singular values were cut."""
        return self.r_before - self.r + self.new_directions


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """One measurement, conversion or update, and what else happened in the same step.

    Attributes
    ----------
    t
        Steps done.
    kind
        "stability" (a measurement in the full-rank phase), "conversion" or "update".
    seconds
        Wall time on this rank (s).
    bytes_sent
        Bytes broadcast by all ranks together.
    earlier
        What the same step did before, in order, e.g. a measurement before a conversion.
    """

    t: int
    kind: Kind
    layers: tuple[LayerUpdate, ...]
    seconds: float
    bytes_sent: int
    earlier: tuple[UpdateReport, ...] = ()

    @property
    def all(self) -> tuple[UpdateReport, ...]:
        """Everything that the step did, in order."""
        return (*self.earlier, replace(self, earlier=()))

    @property
    def reshaped(self) -> bool:
        """Whether any parameter is a new object, so that shapes and memory have changed."""
        sizes = [(layer.r, layer.r_before) for layer in self.layers]
        sizes += [(each.r, each.r_before) for layer in self.layers if (each := layer.input_channels) is not None]
        changed = self.kind == "conversion" or any(r != before for r, before in sizes)
        return changed or any(each.reshaped for each in self.earlier)


def _gathered(layer: LayerUpdate) -> bool:
    return layer.cut_share is not None


# Numbers broadcast for one layer: U, s and Vh; P, s, Qh and four figures; s and a BasisChange. What moments chose is
# another s, or P, s and Qh, and the share that is cut.
_NUMBERS_SENT: dict[Kind, Callable[[LayerUpdate], int]] = {
    "conversion": lambda layer: layer.r * (layer.m + layer.n) + layer.r_before + (layer.r + 1) * _gathered(layer),
    "update": lambda layer: (2 * layer.r_before**2 + layer.r_before) * (1 + _gathered(layer)) + 4 + _gathered(layer),
    "stability": lambda layer: layer.r + 4,
}


def _numbers_sent(kind: Kind, layer: LayerUpdate) -> int:
    inputs = layer.input_channels
    if inputs is None or kind == "stability":
        return _NUMBERS_SENT[kind](layer)
    # Of each mode the values and the vectors that are kept, at an update all of them.
    (s, t), first = (layer.singular_values, inputs.singular_values), kind == "conversion"
    vectors = (layer.m, layer.r), (inputs.n, inputs.r)
    if not first:
        vectors = (layer.r_before, len(s)), (inputs.r_before, len(t))
    return len(s) + len(t) + sum(rows * columns for rows, columns in vectors)


class StepReport:
    """Builds the report of step ``t``: times each part, and counts the bytes sent to ``size - 1`` other ranks."""

    def __init__(self, t: int, size: int) -> None:
        self._t, self._receivers = t, size - 1
        self._parts: list[UpdateReport] = []

    @contextmanager
    def part(self, kind: Kind, targets: Sequence[TargetWeight]) -> Iterator[list[LayerUpdate]]:
        """Time the block, which adds a report for each of ``targets`` to the yielded list."""
        start, layers = time.perf_counter(), list[LayerUpdate]()
        yield layers
        width = compute_dtype(targets[0].trained.dtype).itemsize
        sent = sum(_numbers_sent(kind, layer) for layer in layers) * width * self._receivers
        seconds, done = time.perf_counter() - start, tuple(layers)
        self._parts.append(UpdateReport(t=self._t, kind=kind, layers=done, seconds=seconds, bytes_sent=sent))

    def result(self) -> UpdateReport | None:
        """The last part, with the others as ``earlier``; None if nothing was done."""
        parts = self._parts
        return replace(parts[-1], earlier=tuple(parts[:-1])) if parts else None


def layer_update(
    name: str, shape: tuple[int, int], r_before: int, r: int, s: Tensor, seconds: float, **figures: Any
) -> LayerUpdate:
    """The report of a layer whose weight is of this ``shape``; ``figures`` are the other attributes."""
    m, n = shape
    # A copy: a view would keep all factors alive as long as the report.
    values = s.float().cpu().clone()
    return LayerUpdate(name=name, m=m, n=n, r_before=r_before, r=r, singular_values=values, seconds=seconds, **figures)
