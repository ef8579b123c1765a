"""Stability in the full-rank phase: who has settled since the last look."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_oialr.engines import Engine
from hpc_oialr.linalg.blocks import basis_stability
from hpc_oialr.linalg.svd import compute_dtype, svd
from hpc_oialr.linalg.work_plan import longest_processing_time
from hpc_oialr.lowrank import Site
from hpc_oialr.method.checks import require_finite
from hpc_oialr.method.dealing import Job, deal
from hpc_oialr.method.factorising import split_svd
from hpc_oialr.method.report import LayerUpdate, UpdateReport

Basis = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Look:
    """One layer's singular values, agreement with its last basis (NaN: there was none), and time (s)."""

    index: int
    s: Tensor
    agreement: float
    seconds: float


class StabilityWatch:
    """Measures every dense layer's stability against its last basis.

    A layer is always measured by the same process, which alone keeps its last basis, in host memory, and
    sends k + 1 values. Where weights are split each process keeps its rows of ``U`` and columns of ``Vh``.

    Attributes
    ----------
    streaks
        For each layer, how many measurements in a row were at or above the threshold.
    """

    def __init__(self, sites: Sequence[Site], engine: Engine, threshold: float | None) -> None:
        self.engine, self.world, self.threshold = engine, engine.world, threshold
        costs = [float(site.k) ** 2 * max(site.shape) for site in sites]
        owners = longest_processing_time(costs, self.world.size)
        self.owners = {site.name: owner for site, owner in zip(sites, owners, strict=True)}
        self.streaks: dict[str, int] = {}
        self._bases: dict[str, Basis] = {}

    def report(self, sites: Sequence[Site], t: int) -> UpdateReport:
        """Measure these layers, all dense, after ``t`` steps; sends ``k + 1`` numbers a layer.

        Raises
        ------
        NonFiniteError
            If a weight holds NaN or Inf.
        """
        start = time.perf_counter()
        require_finite(sites, self.engine)
        layers = self.measure(sites)
        numbers = sum((site.k + 1) * compute_dtype(site.trained.dtype).itemsize for site in sites)
        seconds, sent = time.perf_counter() - start, numbers * (self.world.size - 1)
        return UpdateReport(t=t, kind="stability", layers=layers, seconds=seconds, bytes_sent=sent)

    def measure(self, sites: Sequence[Site]) -> tuple[LayerUpdate, ...]:
        """Measure these layers, all dense; one report each."""
        updates: dict[int, LayerUpdate] = {}
        for look in self._split(sites) if self.engine.layout.group is not None else self._dealt(sites):
            site = sites[look.index]
            self._count(site.name, look.agreement)
            updates[look.index] = _report(site, look)
        return tuple(updates[i] for i in sorted(updates))

    def _dealt(self, sites: Sequence[Site]) -> Iterator[_Look]:
        jobs = [self._job(site) for site in sites]
        owners = [self.owners[site.name] for site in sites]
        for result in deal(jobs, self.world, owners=owners):
            self.engine.close(sites[result.index])
            yield _Look(result.index, result.values[:-1], float(result.values[-1]), result.seconds)

    def _job(self, site: Site) -> Job:
        weight = site.weight
        cost = float(site.k) ** 2 * max(site.shape)
        compute, prepare = lambda _: self._look(site), lambda: self.engine.open(site)
        return Job(site.name, compute, site.k + 1, weight, compute_dtype(weight.dtype), cost, prepare)

    def _look(self, site: Site) -> Tensor:
        U, s, Vh = svd(site.weight.reshape(site.shape), name=site.name)
        return torch.cat([s, s.new_tensor([self._agreement(site.name, U, Vh)])])

    def _split(self, sites: Sequence[Site]) -> Iterator[_Look]:
        for index, site in enumerate(sites):
            start = time.perf_counter()
            U, s, Vh = split_svd(site, self.engine)
            agreement = self._agreement(site.name, U, Vh)
            yield _Look(index, s, agreement, time.perf_counter() - start)

    def _agreement(self, name: str, U: Tensor, Vh: Tensor) -> float:
        """Stability against the last basis, of which this one takes the place; NaN if there was none."""
        last = self._bases.get(name)
        self._bases[name] = (U.cpu(), Vh.cpu().contiguous())
        if last is None:
            return float("nan")
        return basis_stability(last[0].to(U), last[1].to(Vh), U, Vh, self.engine.layout.group)

    def _count(self, name: str, agreement: float) -> None:
        settled = self.threshold is not None and agreement >= self.threshold
        self.streaks[name] = self.streaks.get(name, 0) + 1 if settled else 0

    def forget(self, name: str) -> None:
        """Drop what is kept of a layer that was converted."""
        self._bases.pop(name, None)
        self.streaks.pop(name, None)

    def bases(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """All kept bases for a checkpoint, whole or as they are split; a collective call.

        Keys ``NAME.U`` and ``NAME.Vh``.
        """
        kept: dict[str, Tensor] = {}
        known = set().union(*self.world.all_gather_object(set(self._bases)))
        for site in (site for site in sites if site.name in known):
            for part, tensor in zip(("U", "Vh"), self._shared(site), strict=True):
                kept[f"{site.name}.{part}"] = tensor
        return kept

    def _shared(self, site: Site) -> Basis:
        (m, n), k, layout = site.shape, site.k, self.engine.layout
        dtype, device = compute_dtype(site.weight.dtype), site.weight.device
        mine = self._bases.get(site.name)
        parts = mine or (torch.empty(m, k, dtype=dtype), torch.empty(k, n, dtype=dtype))
        sent = [part.to(device) for part in parts]
        if layout.group is not None:
            return layout.put_rows(sent[0], m), layout.put_columns(sent[1], n)
        self.world.share(sent, src=self.owners[site.name])
        return sent[0].cpu(), sent[1].cpu()

    def restore(self, bases: dict[str, Tensor], streaks: dict[str, int]) -> None:
        """Take back what :meth:`bases` gave, whole; each process keeps its own only."""
        self.streaks = dict(streaks)
        layout, split = self.engine.layout, self.engine.layout.group is not None
        mine = [
            name
            for name, owner in self.owners.items()
            if f"{name}.U" in bases and (split or owner == self.world.rank)
        ]
        for name in mine:
            U, Vh = bases[f"{name}.U"], bases[f"{name}.Vh"]
            self._bases[name] = (
                U[layout.own_rows(U.shape[0])].clone(),
                Vh[:, layout.own_columns(Vh.shape[1])].contiguous(),
            )


def _report(site: Site, look: _Look) -> LayerUpdate:
    m, n = site.shape
    return LayerUpdate(
        name=site.name,
        m=m,
        n=n,
        r_before=site.k,
        r=site.k,
        singular_values=look.s.float().cpu(),
        stability=None if look.agreement != look.agreement else look.agreement,
        orthogonality_error_U=0.0,
        orthogonality_error_Vh=0.0,
        seconds=look.seconds,
    )
