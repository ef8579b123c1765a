"""The SVDs of conversions and updates: whole matrices distributed over ranks, sharded ones computed by all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hpc_oialr.linalg.basis_change import (
    angles_of,
    gram_error,
    smallest_cosines,
    smallest_cosines_batched,
)
from hpc_oialr.linalg.svd import SVD, compute_dtype
from hpc_oialr.linalg.tsqr import tsqr_svd
from hpc_oialr.linalg.work_plan import LayerWork
from hpc_oialr.lowrank import LowRankWeight, TargetWeight
from hpc_oialr.method.engine import Engine
from hpc_oialr.method.second_moments import NOTHING, SecondMoments, approximate, approximate_shards
from hpc_oialr.method.svd_scheduler import Job, Result, distribute

# Of the results that wait on a GPU to be read back together, with what an engine may gather for them:
# 256 MiB in fp32. All 73 layers of a ViT-B/16 at r = k/2 have 0.2 of it in results of an update; a conversion has 2.2.
WINDOW_NUMBERS = 1 << 26

# Of each result some float64 numbers, on its device, which are finite unless the SVD failed.
Figures: TypeAlias = Callable[[list[Result]], list[Tensor]]
# How many values of a layer's core are kept, given all of them on the CPU.
Keep: TypeAlias = Callable[[LowRankWeight, Tensor], int]
_FIGURES = (
    *("stability", "subspace_angle_U", "subspace_angle_Vh"),
    *("orthogonality_error_U", "orthogonality_error_Vh"),
)


@dataclass(frozen=True)
class Rotation:
    """``S = P diag(s) Qh`` of the core of target ``index``, whole on every rank; ``spectrum`` is ``s`` on the CPU.

    ``figures`` are attributes of :class:`~hpc_oialr.method.report.LayerUpdate`: stability and angles of the new bases
    against the old ones, orthogonality errors of the old ones.
    """

    index: int
    P: Tensor
    s: Tensor
    Qh: Tensor
    spectrum: Tensor
    figures: dict[str, Any]
    seconds: float
    chosen: Tensor  # by moments, another P, s and Qh of fewer values, in a row; or empty

    def cut(self, r: int) -> SVD:
        """The ``r`` directions to keep."""
        k = len(self.s)
        if r == k or not len(self.chosen):
            return SVD(self.P, self.s, self.Qh).leading(r)
        P, s, Qh = self.chosen[: r * (2 * k + 1)].split([k * r, r, r * k])
        return SVD(P.view(k, r), s, Qh.view(r, k))

    @property
    def error(self) -> float:
        """The larger orthogonality error of ``U`` and ``Vh`` before the rotation."""
        return float(max(self.figures["orthogonality_error_U"], self.figures["orthogonality_error_Vh"]))


def weight_factors(
    targets: Sequence[TargetWeight], kept: Sequence[int], engine: Engine, moments: SecondMoments
) -> Iterator[tuple[int, SVD, Tensor, dict[str, Any]]]:
    """``W = U diag(s) Vh`` of dense layers: index, r triplets, all k values on the CPU, figures for the report.

    ``U`` holds this rank's rows of m x r, ``Vh`` its columns of r x n, with r from ``kept``. The seconds are 0 on ranks
    that did not compute the SVD. Whole weights are distributed over ranks by cost, and ``r (m + n) + k`` numbers a layer
    are sent, r + 1 more where ``moments`` choose the triplets. A weight in row blocks is factorised by all ranks
    together: each sends triangles of at most k^2 numbers log2 P times, and stores up to ``k max(m, n)`` numbers beside
    its block.
    """
    watched = [r < target.k and moments.watches(target) for target, r in zip(targets, kept, strict=True)]
    if engine.layout.group is not None:
        for index, (target, r) in enumerate(zip(targets, kept, strict=True)):
            start = time.perf_counter()
            factors = SVD(*split_svd(target, engine))
            chosen, lost = factors.leading(r), None
            if watched[index]:
                found = moments.reduce(target)
                chosen, lost = approximate_shards(factors, r, found, target.shape, engine)
            about = {"cut_share": None if lost is None else float(lost)}
            yield index, chosen, factors.s.cpu(), about | {"seconds": time.perf_counter() - start}
        return

    def job(target: TargetWeight, r: int, watched: bool) -> Job:
        found = NOTHING

        def pack(factors: SVD) -> Tensor:
            if not watched:
                return torch.cat([part.reshape(-1) for part in (factors.s, *factors.leading(r)[::2])])
            chosen, lost = approximate(factors, r, found)
            parts = factors.s, lost, chosen.s, chosen.U, chosen.Vh
            return torch.cat([part.reshape(-1) for part in parts])

        def prepare() -> Tensor:
            nonlocal found
            if watched and moments.watches(target):  # not at a second attempt
                found = moments.reduce(target)
            return plain.prepare()

        plain = weight_job(target, engine, pack, target.k + r * sum(target.shape) + (r + 1) * watched)
        return replace(plain, prepare=prepare)

    def figures(results: list[Result]) -> list[Tensor]:
        heads = (targets[result.index].k + watched[result.index] for result in results)
        return [result.values[:head].double() for result, head in zip(results, heads, strict=True)]

    jobs = list(map(job, targets, kept, watched))
    # Only a GPU would be waited for at each of them.
    for result, read in _with_figures(jobs, engine, figures, careful=not jobs[0].like.is_cuda):
        i, target = result.index, targets[result.index]
        (m, n), k, r = target.shape, target.k, kept[i]
        values, U, Vh = result.values.split([k + (r + 1) * watched[i], m * r, r * n])
        s = values[-r:] if watched[i] else values[:r]
        about = {"seconds": result.seconds, "cut_share": float(read[k]) if watched[i] else None}
        yield i, SVD(U.view(m, r), s, Vh.view(r, n)), read[:k].to(s.dtype), about


def weight_job(target: TargetWeight, engine: Engine, pack: Callable[[SVD], Tensor], size: int) -> Job:
    """The SVD of a whole dense weight, which ``engine`` gathers first; ``pack`` makes ``size`` values of it."""

    def prepare() -> Tensor:
        engine.gather(target)
        return target.weight.detach().reshape(target.shape)

    return Job(LayerWork(target.name, *target.shape), prepare, pack, size, target.weight)


def split_svd(target: TargetWeight, engine: Engine) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of a dense weight in row blocks: this rank's rows of U, s, its columns of Vh; a collective call."""
    engine.gather(target)
    layout = engine.layout
    U, s, Vh, _ = tsqr_svd(layout.rows(target.weight), layout.group, name=target.name)
    return U, s, Vh[:, layout.own_columns(target.shape[1])]


def core_rotations(
    targets: Sequence[TargetWeight], engine: Engine, moments: SecondMoments, keep: Keep
) -> Iterator[Rotation]:
    """``S = P diag(s) Qh`` of low-rank layers, distributed over the ranks; sends ``2 r^2 + r + 4`` numbers a layer.

    With ``moments`` of the layer twice as many: what they choose where ``keep`` is less than r.

    On a GPU the host waits once for the figures of all layers, or of as many as :data:`WINDOW_NUMBERS` allows. Raises
    :class:`NonFiniteError` on every rank if no SVD of a core converged.
    """

    def parts(result: Result) -> Sequence[Tensor]:
        r = low_rank_layer(targets[result.index]).r
        sizes = [r, r * r, r * r, 2, 2]
        s, P, Qh, cosines, errors, chosen = result.values.split([*sizes, len(result.values) - sum(sizes)])
        return s, P.view(r, r), Qh.view(r, r), cosines, errors, chosen

    def figures(results: list[Result]) -> list[Tensor]:
        found = [parts(result) for result in results]
        if found[0][0].is_cuda:
            cosines = smallest_cosines_batched([basis for _, P, Qh, *_ in found for basis in (P, Qh.mT)])
        read = []
        for i, (result, (s, P, Qh, own_cosines, errors, chosen)) in enumerate(zip(results, found, strict=True)):
            if engine.layout.group is not None:
                errors = _errors(low_rank_layer(targets[result.index]), engine)
            angles = torch.stack(cosines[2 * i : 2 * i + 2]) if s.is_cuda else own_cosines.double()
            own = [s, rotation_stability(P, Qh)[None], angles, errors, chosen[:1]]
            read.append(torch.cat([part.double() for part in own]))
        return read

    jobs = [_core_job(target, engine, moments, keep) for target in targets]
    for result, read in _with_figures(jobs, engine, figures, careful=False):
        s, P, Qh, _, _, chosen = parts(result)
        spectrum, rest, lost = read.tensor_split([len(s), len(s) + 5])
        stability, _, _, *errors_of_bases = rest.tolist()
        named: dict[str, Any] = dict(zip(_FIGURES, (stability, *angles_of(rest[1:3]), *errors_of_bases), strict=True))
        named["cut_share"] = float(lost) if len(lost) else None
        yield Rotation(result.index, P, s, Qh, spectrum.to(s.dtype), named, result.seconds, chosen[1:])


def _core_job(target: TargetWeight, engine: Engine, moments: SecondMoments, keep: Keep) -> Job:
    layer = low_rank_layer(target)
    r, watched, found = layer.r, moments.watches(target), NOTHING

    def prepare() -> Tensor:
        nonlocal found
        if moments.watches(target):  # not at a second attempt
            found = moments.reduce(target)
        engine.gather(target)
        return engine.layout.core(layer.S)

    def pack(factors: SVD) -> Tensor:
        P, s, Qh = factors
        # Errors of sharded bases are computed by all ranks together, afterwards. Between (U, Vh) and (U P, Qh Vh) the
        # Gram products of the bases are the rotations themselves.
        errors = _errors(layer, engine) if engine.layout.group is None else s.new_zeros(2)
        # A GPU would be waited for; there those of all layers are computed together, afterwards.
        cosines = s.new_zeros(2) if s.is_cuda else smallest_cosines(P, Qh.mT)
        parts = [s, P, Qh, cosines, errors.to(s)]
        if watched:
            values = s.cpu()
            # Where no SVD converged, the caller tries another driver.
            r_new = keep(layer, values) if bool(values.isfinite().all()) else r
            chosen, lost = approximate(factors, r_new, found)
            parts += [lost, *chosen, s.new_zeros(r + 2 * r * r - sum(part.numel() for part in chosen))]
        return torch.cat([part.reshape(-1) for part in parts])

    # Some engines gather U and Vh with the core.
    work = LayerWork(target.name, r, r, held=r * (r + sum(target.shape)))
    return Job(work, prepare, pack, (r + 2 * r * r) * (1 + watched) + 4 + watched, layer.S)


def _with_figures(
    jobs: Sequence[Job], engine: Engine, figures: Figures, *, careful: bool
) -> Iterator[tuple[Result, Tensor]]:
    """Each result with its figures on the host; where one is not finite, after a second SVD by the other drivers."""
    failed: list[int] = []
    for result, read in _read_back(distribute(jobs, engine.world, careful=careful), jobs, figures):
        if bool(torch.isfinite(read).all()):
            yield result, read
        else:
            failed.append(result.index)
    if failed:
        # All ranks have read the same values.
        results = distribute([jobs[i] for i in failed], engine.world)
        renumbered = (replace(result, index=failed[result.index]) for result in results)
        yield from _read_back(renumbered, jobs, figures)


def _read_back(results: Iterator[Result], jobs: Sequence[Job], figures: Figures) -> Iterator[tuple[Result, Tensor]]:
    """Results with their ``figures`` (float64) on the host; a GPU is waited for once for many layers."""
    most = WINDOW_NUMBERS if jobs[0].like.is_cuda else 0
    window: list[Result] = []
    numbers = 0
    for result in chain(results, [None]):
        if result is not None:
            window.append(result)
            job = jobs[result.index]
            numbers += job.size + (job.work.m * job.work.n if job.work.held is None else job.work.held)
            if numbers <= most:
                continue
        if window:
            sent = figures(window)
            yield from zip(window, torch.cat(sent).cpu().split(list(map(len, sent))), strict=True)
        window, numbers = [], 0


def rotation_stability(P: Tensor, Qh: Tensor) -> Tensor:
    """Stability between ``(U, Vh)`` and its rotation ``(U P, Qh Vh)``: ``sum(P o Qh^T) / r`` (float64, shape ()).

    Not finite if any entry of ``P`` or ``Qh`` is not.
    """
    return (P * Qh.mT).sum(dtype=torch.float64) / int(P.shape[0])


def low_rank_layer(target: TargetWeight) -> LowRankWeight:
    """The layer of a target that is known to be low-rank."""
    assert target.low_rank is not None
    return target.low_rank


def _errors(layer: LowRankWeight, engine: Engine) -> Tensor:
    layout, dtype = engine.layout, compute_dtype(layer.S.dtype)
    U, V = layout.rows(layer.U).to(dtype), layout.columns(layer.Vh).mT.to(dtype)
    return torch.stack([gram_error(U, layout.group), gram_error(V, layout.group)])
