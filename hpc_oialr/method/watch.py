"""Stability in the full-rank phase: who has settled since the last look."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpc_oialr.linalg.svd import compute_dtype, svd
from hpc_oialr.linalg.work_plan import longest_processing_time
from hpc_oialr.lowrank import Site
from hpc_oialr.method.dealing import Job, deal
from hpc_oialr.method.report import LayerUpdate
from hpc_oialr.method.stability import stability
from hpc_oialr.processes import World

Basis = tuple[Tensor, Tensor]


class StabilityWatch:
    """Measures every dense layer's stability against its last basis.

    A layer is always measured by the same process, which alone keeps its last basis, in host
    memory. Sends k + 1 values per layer.

    Attributes
    ----------
    streaks
        For each layer, how many measurements in a row were at or above the threshold.
    """

    def __init__(self, sites: Sequence[Site], world: World, threshold: float | None) -> None:
        self.world, self.threshold = world, threshold
        costs = [float(site.k) ** 2 * max(site.shape) for site in sites]
        owners = longest_processing_time(costs, world.size)
        self.owners = {site.name: owner for site, owner in zip(sites, owners, strict=True)}
        self.streaks: dict[str, int] = {}
        self._bases: dict[str, Basis] = {}

    def measure(self, sites: Sequence[Site]) -> tuple[LayerUpdate, ...]:
        """Measure these layers, all dense; one report each."""
        jobs = [self._job(site) for site in sites]
        owners = [self.owners[site.name] for site in sites]
        updates = []
        for result in deal(jobs, self.world, owners=owners):
            site, values = sites[result.index], result.values
            agreement = float(values[-1])
            self._count(site.name, agreement)
            updates.append(_report(site, values[:-1], agreement, result.seconds))
        order = {site.name: i for i, site in enumerate(sites)}
        return tuple(sorted(updates, key=lambda update: order[update.name]))

    def _job(self, site: Site) -> Job:
        weight = site.weight
        dtype = compute_dtype(weight.dtype)
        cost = float(site.k) ** 2 * max(site.shape)
        return Job(site.name, lambda: self._look(site), site.k + 1, weight, dtype, cost)

    def _look(self, site: Site) -> Tensor:
        weight = site.weight
        U, s, Vh = svd(weight.reshape(weight.shape[0], -1), name=site.name)
        last = self._bases.get(site.name)
        agreement = float("nan") if last is None else stability(last[0].to(U), last[1].to(Vh), U, Vh)
        self._bases[site.name] = (U.cpu(), Vh.cpu())
        return torch.cat([s, s.new_tensor([agreement])])

    def _count(self, name: str, agreement: float) -> None:
        settled = self.threshold is not None and agreement >= self.threshold
        self.streaks[name] = self.streaks.get(name, 0) + 1 if settled else 0

    def forget(self, name: str) -> None:
        """Drop what is kept of a layer that was converted."""
        self._bases.pop(name, None)
        self.streaks.pop(name, None)

    def bases(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """All kept bases, on every process, for a checkpoint; a collective call.

        Keys ``NAME.U`` and ``NAME.Vh``.
        """
        kept: dict[str, Tensor] = {}
        known = set().union(*self.world.all_gather_object(set(self._bases)))
        for site in (site for site in sites if site.name in known):
            for part, tensor in zip(("U", "Vh"), self._shared(site), strict=True):
                kept[f"{site.name}.{part}"] = tensor
        return kept

    def _shared(self, site: Site) -> Basis:
        (m, n), k = site.shape, site.k
        dtype, device = compute_dtype(site.weight.dtype), site.weight.device
        mine = self._bases.get(site.name)
        parts = mine or (torch.empty(m, k, dtype=dtype), torch.empty(k, n, dtype=dtype))
        sent = [part.to(device) for part in parts]
        self.world.share(sent, src=self.owners[site.name])
        return sent[0].cpu(), sent[1].cpu()

    def restore(self, bases: dict[str, Tensor], streaks: dict[str, int]) -> None:
        """Take back what :meth:`bases` gave; each process keeps its own layers only."""
        self.streaks = dict(streaks)
        mine = [
            name for name, owner in self.owners.items() if owner == self.world.rank and f"{name}.U" in bases
        ]
        self._bases = {name: (bases[f"{name}.U"], bases[f"{name}.Vh"]) for name in mine}


def _report(site: Site, s: Tensor, agreement: float, seconds: float) -> LayerUpdate:
    m, n = site.shape
    return LayerUpdate(
        name=site.name,
        m=m,
        n=n,
        r_before=site.k,
        r=site.k,
        singular_values=s.float().cpu(),
        stability=None if agreement != agreement else agreement,
        orthogonality_error_U=0.0,
        orthogonality_error_Vh=0.0,
        seconds=seconds,
    )
