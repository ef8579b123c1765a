"""Stability of the bases in the full-rank phase: how much each layer's basis has changed since its last SVD."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from hpc_oialr.errors import ModelError
from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.linalg.basis_change import BasisChange, basis_change
from hpc_oialr.linalg.svd import SVD, compute_dtype
from hpc_oialr.linalg.work_plan import longest_processing_time, svd_cost
from hpc_oialr.lowrank import TargetWeight
from hpc_oialr.method.checks import require_finite
from hpc_oialr.method.decompositions import split_svd, weight_job
from hpc_oialr.method.engine import Engine
from hpc_oialr.method.report import LayerUpdate, layer_update
from hpc_oialr.method.svd_scheduler import Job, distribute


class StabilityTracker:
    """Measures every dense layer's stability against its previous basis.

    A layer is always measured by the same rank, which alone stores its last SVD, in host memory, and broadcasts k + 4
    values. Of a sharded weight each rank stores its rows of ``U`` and columns of ``Vh``.
    """

    def __init__(self, targets: Sequence[TargetWeight], engine: Engine, threshold: float | None) -> None:
        self.engine, self.world, self.threshold = engine, engine.world, threshold
        costs = [svd_cost(*target.shape) for target in targets]
        owners = longest_processing_time(costs, self.world.size)
        self.owners = {target.name: owner for target, owner in zip(targets, owners, strict=True)}
        # For each layer, how many measurements in a row were at or above the threshold.
        self.streaks: dict[str, int] = {}
        self._bases: dict[str, SVD] = {}

    @exact_arithmetic()
    def measure(self, targets: Sequence[TargetWeight]) -> list[LayerUpdate]:
        """Measure these layers, all dense; one report each."""
        require_finite(targets, self.engine)
        updates: dict[int, LayerUpdate] = {}
        if self.engine.layout.group is not None:
            for i, target in enumerate(targets):
                start = time.perf_counter()
                now = SVD(*split_svd(target, self.engine))
                change = self._change(target, now)
                updates[i] = self._count(target, now.s, change, time.perf_counter() - start)
            return list(updates.values())

        def job(target: TargetWeight) -> Job:
            def pack(factors: SVD) -> list[Tensor]:
                return [factors.s, factors.s.new_tensor(self._change(target, factors))]

            return weight_job(target, self.engine, pack, [(target.k,), (len(BasisChange._fields),)])

        owners = [self.owners[target.name] for target in targets]
        for result in distribute(list(map(job, targets)), self.world, owners=owners):
            target = targets[result.index]
            self.engine.release(target)
            s, figures = result.values
            updates[result.index] = self._count(target, s, BasisChange(*figures.tolist()), result.seconds)
        return [updates[i] for i in sorted(updates)]

    def _change(self, target: TargetWeight, now: SVD) -> BasisChange:
        """The change since the last SVD, which this one replaces."""
        layout, last = self.engine.layout, self._bases.get(target.name)
        self._bases[target.name] = SVD(*(part.cpu().contiguous() for part in now))
        if last is None:
            return BasisChange()
        last = SVD(*(part.to(now.s) for part in last))
        return basis_change(last, now, layout.group, whole=lambda Vh: layout.whole_columns(Vh, target.shape[1]))

    def _count(self, target: TargetWeight, s: Tensor, change: BasisChange, seconds: float) -> LayerUpdate:
        stable = self.threshold is not None and change.stability >= self.threshold
        self.streaks[target.name] = self.streaks.get(target.name, 0) + 1 if stable else 0
        return measured(target.name, target.shape, s, change, seconds)

    def forget(self, name: str) -> None:
        """Free the SVD of a layer that was converted."""
        self._bases.pop(name, None)
        self.streaks.pop(name, None)

    def bases(self, targets: Sequence[TargetWeight]) -> dict[str, Tensor]:
        """All stored bases for a checkpoint, whole or as DTensors: ``NAME.U``, ``NAME.s``, ``NAME.Vh``; collective."""
        kept: dict[str, Tensor] = {}
        known = set().union(*self.world.all_gather_object(set(self._bases)))
        for target in (target for target in targets if target.name in known):
            (m, n), k, layout = target.shape, target.k, self.engine.layout
            dtype, device = compute_dtype(target.weight.dtype), target.weight.device
            mine = self._bases.get(target.name)
            parts = mine or (torch.empty(shape, dtype=dtype) for shape in ((m, k), (k,), (k, n)))
            now = SVD(*(part.to(device) for part in parts))
            if layout.group is not None:
                now = SVD(layout.put_rows(now.U, m), now.s, layout.put_columns(now.Vh, n))
            else:
                self.world.share(now, src=self.owners[target.name])
                now = SVD(*(part.cpu() for part in now))
            kept |= {f"{target.name}.{part}": tensor for part, tensor in now._asdict().items()}
        return kept

    def require(self, bases: dict[str, Tensor] | None, streaks: dict[str, int]) -> None:
        """Raise :class:`ModelError` where the moment of conversion depends on bases that were not given."""
        if bases is None and streaks and self.threshold is not None:
            raise ModelError(
                "the moment of conversion depends on bases that were kept for measuring stability. Store "
                "oialr.tensor_state() beside oialr.state_dict(), and load both: oialr.load_state_dict(state, tensors)."
            )

    def restore(self, bases: dict[str, Tensor], streaks: dict[str, int]) -> None:
        """Replace the stored bases by those of :meth:`bases`, given whole; each rank keeps only its own."""
        self.streaks = dict(streaks)
        self._bases.clear()
        layout, split = self.engine.layout, self.engine.layout.group is not None
        for name, owner in self.owners.items():
            if f"{name}.s" in bases and (split or owner == self.world.rank):
                U, s, Vh = (bases[f"{name}.{part}"] for part in SVD._fields)
                rows, columns = layout.own_rows(U.shape[0]), layout.own_columns(Vh.shape[1])
                self._bases[name] = SVD(U[rows].clone(), s.clone(), Vh[:, columns].contiguous())


def measured(name: str, shape: tuple[int, int], s: Tensor, change: BasisChange, seconds: float) -> LayerUpdate:
    """The report of a dense weight's SVD."""
    names = ("stability", "subspace_angle_U", "subspace_angle_Vh", "r_factor_distance")
    figures = {key: None if math.isnan(value) else value for key, value in zip(names, change, strict=True)}
    return layer_update(name, shape, min(shape), min(shape), s, seconds, **figures)
