"""The SVDs of an event: one layer a process where matrices are whole, all processes on each where they are split."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_oialr.engines import Engine
from hpc_oialr.linalg.blocks import orthogonality_error
from hpc_oialr.linalg.svd import SVD, compute_dtype
from hpc_oialr.linalg.tsqr import tsqr_svd
from hpc_oialr.linalg.work_plan import LayerWork
from hpc_oialr.lowrank import LowRankWeight, Site
from hpc_oialr.method.dealing import Job, deal


@dataclass(frozen=True)
class Factors:
    """A weight's leading factors.

    Attributes
    ----------
    index
        Which of the sites.
    U, Vh
        This process's rows of m x r and columns of r x n.
    s
        All k singular values.
    seconds
        Time of the SVD where it was done (s); 0 elsewhere.
    """

    index: int
    U: Tensor
    s: Tensor
    Vh: Tensor
    seconds: float


@dataclass(frozen=True)
class Rotation:
    """A core's factors ``S = P diag(s) Qh``, whole on every process, and both bases' orthogonality errors."""

    index: int
    P: Tensor
    s: Tensor
    Qh: Tensor
    errors: tuple[float, float]
    seconds: float


def weight_factors(sites: Sequence[Site], kept: Sequence[int], engine: Engine) -> Iterator[Factors]:
    """``W = U diag(s) Vh`` of dense layers, one after another; the first ``kept`` columns and rows.

    Whole weights are dealt over the processes by cost; what is sent is ``r (m + n) + k`` numbers a layer. One
    that has more than a process's share of the work, and is long enough, is shared by several.
    Of a weight in row blocks each process works on its own, which it never shows to another: it sends
    triangles of at most k^2 numbers log2 P times, and no process holds more than ``k max(m, n)`` numbers
    beside its block, of one layer at a time.
    """
    return _dealt(sites, kept, engine) if engine.layout.group is None else _blockwise(sites, kept, engine)


def _dealt(sites: Sequence[Site], kept: Sequence[int], engine: Engine) -> Iterator[Factors]:
    jobs = [_weight_job(site, r, engine) for site, r in zip(sites, kept, strict=True)]
    for result in deal(jobs, engine.world):
        (m, n), k, r = sites[result.index].shape, sites[result.index].k, kept[result.index]
        s, U, Vh = result.values.split([k, m * r, r * n])
        yield Factors(result.index, U.view(m, r), s, Vh.view(r, n), result.seconds)


def _weight_job(site: Site, r: int, engine: Engine) -> Job:
    (m, n), k = site.shape, site.k

    def prepare() -> Tensor:
        engine.open(site)
        return site.weight.detach().reshape(m, n)

    def pack(factors: SVD) -> Tensor:
        U, s, Vh = factors
        return torch.cat([s, U[:, :r].reshape(-1), Vh[:r].reshape(-1)])

    return Job(LayerWork(site.name, m, n), prepare, pack, k + r * (m + n), site.weight)


def _blockwise(sites: Sequence[Site], kept: Sequence[int], engine: Engine) -> Iterator[Factors]:
    for index, (site, r) in enumerate(zip(sites, kept, strict=True)):
        start = time.perf_counter()
        U, s, Vh = split_svd(site, engine)
        yield Factors(index, U[:, :r], s, Vh[:r], time.perf_counter() - start)


def split_svd(site: Site, engine: Engine) -> tuple[Tensor, Tensor, Tensor]:
    """Of a dense layer's weight in row blocks: this process's rows of U, s, its columns of Vh; a collective call."""
    engine.open(site)
    layout = engine.layout
    U, s, Vh, _ = tsqr_svd(layout.rows(site.weight), layout.group, name=site.name)
    return U, s, Vh[:, layout.own_columns(site.shape[1])]


def core_rotations(sites: Sequence[Site], engine: Engine) -> Iterator[Rotation]:
    """``S = P diag(s) Qh`` of low-rank layers, dealt over the processes; sends ``2 r^2 + r + 2`` numbers a layer."""
    jobs = [_core_job(site, engine) for site in sites]
    for result in deal(jobs, engine.world):
        layer = _layer(sites[result.index])
        r = layer.r
        s, P, Qh, errors = result.values.split([r, r * r, r * r, 2])
        if engine.layout.group is not None:
            errors = _errors(layer, engine)
        error_U, error_Vh = errors.tolist()
        yield Rotation(result.index, P.view(r, r), s, Qh.view(r, r), (error_U, error_Vh), result.seconds)


def _core_job(site: Site, engine: Engine) -> Job:
    layer = _layer(site)
    r = layer.r

    def prepare() -> Tensor:
        engine.open(site)
        return engine.layout.core(layer.S)

    def pack(factors: SVD) -> Tensor:
        P, s, Qh = factors
        # Of split bases all processes measure the errors together, afterwards.
        errors = _errors(layer, engine) if engine.layout.group is None else torch.zeros(2)
        return torch.cat([s, P.reshape(-1), Qh.reshape(-1), errors.to(s)])

    # Some engines bring U and Vh too when they open a layer.
    work = LayerWork(site.name, r, r, held=r * (r + sum(site.shape)))
    return Job(work, prepare, pack, r + 2 * r * r + 2, layer.S)


def _layer(site: Site) -> LowRankWeight:
    assert site.low_rank is not None
    return site.low_rank


def _errors(layer: LowRankWeight, engine: Engine) -> Tensor:
    layout, dtype = engine.layout, compute_dtype(layer.S.dtype)
    U, V = layout.rows(layer.U).to(dtype), layout.columns(layer.Vh).mT.to(dtype)
    return torch.tensor([orthogonality_error(U, layout.group), orthogonality_error(V, layout.group)])
