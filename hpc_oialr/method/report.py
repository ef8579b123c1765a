"""What one measurement, conversion or update did: the record every writer gets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from hpc_oialr.lowrank import TargetWeight

Kind = Literal["stability", "conversion", "update"]


@dataclass(frozen=True, kw_only=True)
class LayerUpdate:
    """One layer's part.

    Attributes
    ----------
    name, m, n
        The layer and its weight's shape.
    r_before, r
        Inner dimension before and after; k while the weight is dense.
    singular_values
        All values before the cut, descending (fp32, CPU).
    stability
        Agreement with the basis before; None where there was none.
    orthogonality_error_U, orthogonality_error_Vh
        ``||Q^T Q - I||_F / sqrt(r)`` before this update; 0 while dense.
    seconds
        Time of the SVD on a process that did it (s); 0 on the others.
    subspace_angle_U, subspace_angle_Vh
        Largest principal angle between the leading quarters of this basis and of the one before (rad); None
        where there was none. See :func:`~hpc_oialr.linalg.basis_change.smallest_cosines`.
    r_factor_distance
        ``||R' - R||_F / ||R||_F``, R of the weight's QR, R' the new one; None where there was none before, and
        once the weight is low-rank.
    """

    name: str
    m: int
    n: int
    r_before: int
    r: int
    singular_values: Tensor
    stability: float | None
    orthogonality_error_U: float
    orthogonality_error_Vh: float
    seconds: float
    subspace_angle_U: float | None = None
    subspace_angle_Vh: float | None = None
    r_factor_distance: float | None = None

    @property
    def cut_values(self) -> int:
        """How many singular values were cut."""
        return self.r_before - self.r


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
        Wall time of it on this process (s).
    bytes_sent
        Bytes broadcast in all, by all processes together.
    earlier
        What the same step did before it, e.g. a measurement before a conversion; in this order.
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
        cut = self.kind == "conversion" or any(layer.cut_values for layer in self.layers)
        return cut or any(each.reshaped for each in self.earlier)


def layer_update(
    target: TargetWeight,
    r_before: int,
    s: Tensor,
    stability: float | None,
    errors: tuple[float, float],
    seconds: float,
) -> LayerUpdate:
    """The report of a low-rank layer, as it is now."""
    layer = target.low_rank
    assert layer is not None
    return LayerUpdate(
        name=target.name,
        m=layer.m,
        n=layer.n,
        r_before=r_before,
        r=layer.r,
        # Not a view: that would keep all factors alive for as long as someone keeps the report.
        singular_values=s.float().cpu().clone(),
        stability=stability,
        orthogonality_error_U=errors[0],
        orthogonality_error_Vh=errors[1],
        seconds=seconds,
    )
