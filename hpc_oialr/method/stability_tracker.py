"""Stability in the full-rank phase: who has settled since the last look."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_oialr.errors import ModelError
from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.linalg.basis_change import BasisChange, basis_change
from hpc_oialr.linalg.svd import SVD, compute_dtype
from hpc_oialr.linalg.work_plan import LayerWork, longest_processing_time, svd_cost
from hpc_oialr.lowrank import TargetWeight
from hpc_oialr.method.checks import require_finite
from hpc_oialr.method.decompositions import split_svd
from hpc_oialr.method.engine import Engine
from hpc_oialr.method.report import LayerUpdate, UpdateReport
from hpc_oialr.method.svd_scheduler import Job, distribute


@dataclass(frozen=True)
class Measurement:
    """One layer's singular values, what has changed since its last SVD, and time (s)."""

    index: int
    s: Tensor
    change: BasisChange
    seconds: float


class StabilityTracker:
    """Measures every dense layer's stability against its last basis.

    A layer is always measured by the same process, which alone keeps its last SVD, in host memory, and
    sends k + 4 values. Where weights are split each process keeps its rows of ``U`` and columns of ``Vh``.

    Attributes
    ----------
    streaks
        For each layer, how many measurements in a row were at or above the threshold.
    """

    def __init__(self, targets: Sequence[TargetWeight], engine: Engine, threshold: float | None) -> None:
        self.engine, self.world, self.threshold = engine, engine.world, threshold
        costs = [svd_cost(*target.shape) for target in targets]
        owners = longest_processing_time(costs, self.world.size)
        self.owners = {target.name: owner for target, owner in zip(targets, owners, strict=True)}
        self.streaks: dict[str, int] = {}
        self._bases: dict[str, SVD] = {}

    def report(self, targets: Sequence[TargetWeight], t: int) -> UpdateReport:
        """Measure these layers, all dense, after ``t`` steps; sends ``k + 4`` numbers a layer.

        Raises
        ------
        NonFiniteError
            If a weight holds NaN or Inf.
        """
        start = time.perf_counter()
        require_finite(targets, self.engine)
        layers = self.measure(targets)
        numbers = sum(
            (target.k + len(BasisChange._fields)) * compute_dtype(target.trained.dtype).itemsize
            for target in targets
        )
        seconds, sent = time.perf_counter() - start, numbers * (self.world.size - 1)
        return UpdateReport(t=t, kind="stability", layers=layers, seconds=seconds, bytes_sent=sent)

    @exact_arithmetic()
    def measure(self, targets: Sequence[TargetWeight]) -> tuple[LayerUpdate, ...]:
        """Measure these layers, all dense; one report each."""
        updates: dict[int, LayerUpdate] = {}
        for look in self._split(targets) if self.engine.layout.group is not None else self._dealt(targets):
            target = targets[look.index]
            self._count(target.name, look.change.stability)
            updates[look.index] = measured(target.name, target.shape, look.s, look.change, look.seconds)
        return tuple(updates[i] for i in sorted(updates))

    def _dealt(self, targets: Sequence[TargetWeight]) -> Iterator[Measurement]:
        jobs = [self._job(target) for target in targets]
        owners = [self.owners[target.name] for target in targets]
        for result in distribute(jobs, self.world, owners=owners):
            self.engine.release(targets[result.index])
            s, change = result.values.split([targets[result.index].k, len(BasisChange._fields)])
            yield Measurement(result.index, s, BasisChange(*change.tolist()), result.seconds)

    def _job(self, target: TargetWeight) -> Job:
        def prepare() -> Tensor:
            self.engine.gather(target)
            return target.weight.detach().reshape(target.shape)

        def pack(factors: SVD) -> Tensor:
            return torch.cat([factors.s, factors.s.new_tensor(self._change(target, factors))])

        size = target.k + len(BasisChange._fields)
        return Job(LayerWork(target.name, *target.shape), prepare, pack, size, target.weight)

    def _split(self, targets: Sequence[TargetWeight]) -> Iterator[Measurement]:
        for index, target in enumerate(targets):
            start = time.perf_counter()
            now = SVD(*split_svd(target, self.engine))
            yield Measurement(index, now.s, self._change(target, now), time.perf_counter() - start)

    def _change(self, target: TargetWeight, now: SVD) -> BasisChange:
        """Since the last SVD, of which this one takes the place."""
        layout, last = self.engine.layout, self._bases.get(target.name)
        self._bases[target.name] = SVD(*(part.cpu().contiguous() for part in now))
        if last is None:
            return BasisChange()
        last = SVD(*(part.to(now.s) for part in last))
        return basis_change(
            last, now, layout.group, whole=lambda Vh: layout.whole_columns(Vh, target.shape[1])
        )

    def _count(self, name: str, agreement: float) -> None:
        settled = self.threshold is not None and agreement >= self.threshold
        self.streaks[name] = self.streaks.get(name, 0) + 1 if settled else 0

    def forget(self, name: str) -> None:
        """Drop what is kept of a layer that was converted."""
        self._bases.pop(name, None)
        self.streaks.pop(name, None)

    def bases(self, targets: Sequence[TargetWeight]) -> dict[str, Tensor]:
        """All kept bases for a checkpoint, whole or as they are split; a collective call.

        Keys ``NAME.U``, ``NAME.s`` and ``NAME.Vh``.
        """
        kept: dict[str, Tensor] = {}
        known = set().union(*self.world.all_gather_object(set(self._bases)))
        for target in (target for target in targets if target.name in known):
            for part, tensor in zip(SVD._fields, self._shared(target), strict=True):
                kept[f"{target.name}.{part}"] = tensor
        return kept

    def _shared(self, target: TargetWeight) -> SVD:
        (m, n), k, layout = target.shape, target.k, self.engine.layout
        dtype, device = compute_dtype(target.weight.dtype), target.weight.device
        mine = self._bases.get(target.name)
        parts = mine or (torch.empty(shape, dtype=dtype) for shape in ((m, k), (k,), (k, n)))
        sent = SVD(*(part.to(device) for part in parts))
        if layout.group is not None:
            return SVD(layout.put_rows(sent.U, m), sent.s, layout.put_columns(sent.Vh, n))
        self.world.share(sent, src=self.owners[target.name])
        return SVD(*(part.cpu() for part in sent))

    def require(self, bases: dict[str, Tensor] | None, streaks: dict[str, int]) -> None:
        """Raise :class:`ModelError` where the moment of conversion depends on bases that were not given."""
        if bases is None and streaks and self.threshold is not None:
            raise ModelError(
                "the moment of conversion depends on bases that were kept for measuring stability. Store "
                "oialr.tensor_state() beside oialr.state_dict(), and load both: oialr.load_state_dict(state, tensors)."
            )

    def restore(self, bases: dict[str, Tensor], streaks: dict[str, int]) -> None:
        """Take back what :meth:`bases` gave, whole, in place of what is kept; each process keeps its own only."""
        self.streaks = dict(streaks)
        self._bases.clear()
        layout, split = self.engine.layout, self.engine.layout.group is not None
        mine = [
            name
            for name, owner in self.owners.items()
            if f"{name}.s" in bases and (split or owner == self.world.rank)
        ]
        for name in mine:
            U, s, Vh = (bases[f"{name}.{part}"] for part in SVD._fields)
            self._bases[name] = SVD(
                U[layout.own_rows(U.shape[0])].clone(),
                s.clone(),
                Vh[:, layout.own_columns(Vh.shape[1])].contiguous(),
            )


def measured(
    name: str, shape: tuple[int, int], s: Tensor, change: BasisChange, seconds: float
) -> LayerUpdate:
    """The report of a dense weight's SVD."""
    (m, n), k = shape, min(shape)
    stability, angle_U, angle_Vh, distance = (None if math.isnan(value) else value for value in change)
    return LayerUpdate(
        name=name,
        m=m,
        n=n,
        r_before=k,
        r=k,
        singular_values=s.float().cpu().clone(),
        stability=stability,
        orthogonality_error_U=0.0,
        orthogonality_error_Vh=0.0,
        seconds=seconds,
        subspace_angle_U=angle_U,
        subspace_angle_Vh=angle_Vh,
        r_factor_distance=distance,
    )
