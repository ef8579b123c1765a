"""The SVDs of conversions and updates: whole matrices distributed over ranks, sharded ones computed by all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hpc_oialr.linalg.basis_change import (
    angles_of,
    gram_errors,
    smallest_cosines,
    smallest_cosines_batched,
)
from hpc_oialr.linalg.svd import SVD, compute_dtype
from hpc_oialr.linalg.tsqr import tsqr_svd
from hpc_oialr.linalg.work_plan import LayerWork
from hpc_oialr.lowrank import LowRankWeight, TargetWeight
from hpc_oialr.method.config import OIALRConfig
from hpc_oialr.method.engine import Engine
from hpc_oialr.method.rules import MANY_TOKENS, Spectrum
from hpc_oialr.method.second_moments import (
    NOTHING,
    SecondMoments,
    approximate,
    approximate_shards,
    importance_values,
)
from hpc_oialr.method.svd_scheduler import Job, Result, agreed_room, distribute

# Of the results that wait on a GPU to be read back together, with what an engine may gather for them:
# 256 MiB in fp32. All 73 layers of a ViT-B/16 at r = k/2 have 0.2 of it in results of an update; a conversion has 2.2.
WINDOW_NUMBERS = 1 << 26

# Of each result some numbers, on its device, which are finite unless the SVD failed: any of its values, and float64
# numbers in equal number for all (L x c).
Figures: TypeAlias = Callable[[list[Result]], tuple[list[Tensor], Tensor]]
# How many values of a layer's core are kept, given all of them on the CPU.
Keep: TypeAlias = Callable[[LowRankWeight, Tensor], int]
# As well as how many new directions join them.
Choice: TypeAlias = Callable[[LowRankWeight, Tensor], tuple[int, int]]
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

    def cut(self, r: int) -> tuple[Tensor, Tensor, Tensor]:
        """The ``r`` directions to keep: ``P``, ``diag(s)`` and ``Qh``."""
        k = len(self.s)
        if r == k or not len(self.chosen):
            P, s, Qh = SVD(self.P, self.s, self.Qh).leading(r)
            return P, torch.diag(s), Qh
        P, s, Qh = self.chosen[: r * (2 * k + 1)].split([k * r, r, r * k])
        return P.view(k, r), torch.diag(s), Qh.view(r, k)

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

        def pack(factors: SVD) -> Sequence[Tensor]:
            if not watched:
                return factors.s, *factors.leading(r)[::2]
            chosen, lost = approximate(factors, r, found)
            return factors.s, lost, chosen.s, chosen.U, chosen.Vh

        def prepare() -> Tensor:
            nonlocal found
            if watched and moments.watches(target):  # not at a second attempt
                found = moments.reduce(target)
            return plain.prepare()

        (m, n), k = target.shape, target.k
        shapes = [(k + 1,), (r,), (m, r), (r, n)] if watched else [(k,), (m, r), (r, n)]
        plain = weight_job(target, engine, pack, shapes)
        return replace(plain, prepare=prepare)

    def figures(results: list[Result]) -> tuple[list[Tensor], Tensor]:
        heads = [result.values[0] for result in results]
        return heads, heads[0].new_empty(len(results), 0, dtype=torch.float64)

    jobs = list(map(job, targets, kept, watched))
    # Only a GPU would be waited for at each of them.
    for result, read in _with_figures(jobs, engine, figures, careful=not jobs[0].like.is_cuda):
        i, target = result.index, targets[result.index]
        k, (*values, U, Vh) = target.k, result.values
        s = values[-1][: kept[i]]
        about = {"seconds": result.seconds, "cut_share": float(read[k]) if watched[i] else None}
        yield i, SVD(U, s, Vh), read[:k].to(s.dtype), about


def weight_job(
    target: TargetWeight, engine: Engine, pack: Callable[[SVD], Sequence[Tensor]], shapes: Sequence[tuple[int, ...]]
) -> Job:
    """The SVD of a whole dense weight, which ``engine`` gathers first; ``pack`` makes tensors of ``shapes`` of it."""

    def prepare() -> Tensor:
        engine.gather(target)
        return target.weight.detach().reshape(target.shape)

    return Job(LayerWork(target.name, *target.shape), prepare, pack, shapes, target.weight)


def split_svd(target: TargetWeight, engine: Engine) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of a dense weight in row blocks: this rank's rows of U, s, its columns of Vh; a collective call."""
    engine.gather(target)
    layout = engine.layout
    U, s, Vh, _ = tsqr_svd(layout.rows(target.weight), layout.group, name=target.name)
    return U, s, Vh[:, layout.own_columns(target.shape[1])]


def choice_of_r(
    targets: Sequence[TargetWeight],
    config: OIALRConfig,
    engine: Engine,
    moments: SecondMoments,
    growing: Collection[LowRankWeight],
) -> Choice:
    """What the rule, within its limits, keeps of each core, and how many directions join those of ``growing`` layers.

    A rule by importance makes it a collective call with one more SVD a core; all ranks use rank 0's choice, as tokens may
    differ.
    """
    rule, limits = config.rule, config.limits

    def within(layer: LowRankWeight, wanted: int, r: int) -> tuple[int, int]:
        return limits.renewed(wanted, r, layer.k, config.grow if layer in growing else 0.0)

    if not rule.by_importance:
        # Of a Tucker layer the core may have fewer values than r.
        return lambda layer, s: within(layer, rule.choose(s, layer.m, layer.n), len(s))
    layers, trained = list(map(low_rank_layer, targets)), config.train == "factors"
    most = max(layer.tokens for layer in layers) or MANY_TOKENS
    spectra = [
        Spectrum(s, layer.m, layer.n, layer.tokens or most, trained)
        for layer, s in zip(layers, _core_spectra(targets, engine, moments), strict=True)
    ]
    wanted = torch.tensor(rule.choose_all(spectra, limits), device=layers[0].S.device)
    engine.world.share([wanted])
    chosen = {id(layer): within(layer, r, layer.r) for layer, r in zip(layers, wanted.tolist(), strict=True)}
    return lambda layer, _: chosen[id(layer)]


def _core_spectra(targets: Sequence[TargetWeight], engine: Engine, moments: SecondMoments) -> list[Tensor]:
    """By which directions of cores are compared, on the CPU; sends r numbers a layer, and keeps reduced ``moments``."""

    def job(target: TargetWeight) -> Job:
        layer, found = low_rank_layer(target), NOTHING

        def prepare() -> Tensor:
            nonlocal found
            if moments.watches(target):
                found = moments.reduce(target, keep=True)
            engine.gather(target)
            return engine.layout.core(layer.S)

        def pack(factors: SVD) -> Sequence[Tensor]:
            return (importance_values(factors, found),)

        held = None if engine.whole_bases else layer.r * (layer.r + sum(target.shape))
        return Job(LayerWork(target.name, layer.r, layer.r, held), prepare, pack, [(layer.r,)], layer.S)

    def figures(results: list[Result]) -> tuple[list[Tensor], Tensor]:
        heads = [result.values[0] for result in results]
        return heads, heads[0].new_empty(len(results), 0, dtype=torch.float64)

    found: dict[int, Tensor] = {}
    for result, read in _with_figures(list(map(job, targets)), engine, figures, careful=False):
        engine.release(targets[result.index])
        found[result.index] = read
    return [found[i] for i in sorted(found)]


def core_rotations(
    targets: Sequence[TargetWeight], engine: Engine, moments: SecondMoments, keep: Keep
) -> Iterator[Rotation]:
    """``S = P diag(s) Qh`` of low-rank layers, distributed over the ranks; sends ``2 r^2 + r + 4`` numbers a layer.

    With ``moments`` of the layer twice as many: what they choose where ``keep`` is less than r.

    On a GPU the host waits once for the figures of all layers, or of as many as :data:`WINDOW_NUMBERS` allows. Raises
    :class:`NonFiniteError` on every rank if no SVD of a core converged.
    """

    watched = [moments.watches(target) for target in targets]

    def figures(results: list[Result]) -> tuple[list[Tensor], Tensor]:
        found = [result.values for result in results]
        more = torch.stack([rotation_stability(P, Qh) for _, _, P, Qh, _ in found])[:, None]
        if engine.layout.group is not None:
            for result, (head, *_) in zip(results, found, strict=True):
                layer = low_rank_layer(targets[result.index])
                head[layer.r : layer.r + 2] = _errors(layer, engine)
        if not found[0][0].is_cuda:
            return [torch.cat([head, cosines]) for head, cosines, *_ in found], more
        angles = smallest_cosines_batched([basis for _, _, P, Qh, _ in found for basis in (P, Qh.mT)])
        return [head for head, *_ in found], torch.cat([torch.stack(angles).view(-1, 2), more], dim=1)

    jobs = [_core_job(*each, engine, moments, keep) for each in zip(targets, watched, strict=True)]
    for result, read in _with_figures(jobs, engine, figures, careful=False):
        head, _, P, Qh, chosen = result.values
        spectrum, errors, lost, cosines, stability = read.split_with_sizes([len(P), 2, watched[result.index], 2, 1])
        values = (float(stability), *angles_of(cosines), *errors.tolist())
        named: dict[str, Any] = dict(zip(_FIGURES, values, strict=True))
        named["cut_share"] = float(lost) if len(lost) else None
        s = head[: len(P)]
        yield Rotation(result.index, P, s, Qh, spectrum.to(s.dtype), named, result.seconds, chosen)


def _core_job(target: TargetWeight, watched: bool, engine: Engine, moments: SecondMoments, keep: Keep) -> Job:
    layer = low_rank_layer(target)
    r, found = layer.r, NOTHING

    def prepare() -> Tensor:
        nonlocal found
        if moments.watches(target):  # not at a second attempt
            found = moments.reduce(target)
        engine.gather(target)
        return engine.layout.core(layer.S)

    def pack(factors: SVD) -> Sequence[Tensor]:
        P, s, Qh = factors
        # Errors of sharded bases are computed by all ranks together, afterwards.
        errors = (_errors(layer, engine) if engine.layout.group is None else s.new_zeros(2)).to(s)
        # Between (U, Vh) and (U P, Qh Vh) the Gram products of the bases are the rotations themselves. A GPU would be
        # waited for; there the angles of all layers are computed together, afterwards, and these numbers are not used.
        cosines = errors if s.is_cuda else smallest_cosines(P, Qh.mT)
        if not watched:
            return s, errors, cosines, P, Qh
        values = s.cpu()
        # Where no SVD converged, the caller tries another driver.
        r_new = keep(layer, values) if bool(values.isfinite().all()) else r
        chosen, lost = approximate(factors, r_new, found)
        unused = s.new_zeros(r + 2 * r * r - sum(part.numel() for part in chosen))
        return s, errors, lost, cosines, P, Qh, *chosen, unused

    # Engines that shard factors gather U and Vh with the core.
    held = None if engine.whole_bases else r * (r + sum(target.shape))
    work = LayerWork(target.name, r, r, held)
    # Singular values, errors and what is lost; cosines, P, Qh, and what moments chose.
    shapes = [(r + 2 + watched,), (2,), (r, r), (r, r), ((r + 2 * r * r) * watched,)]
    return Job(work, prepare, pack, shapes, layer.S)


def _with_figures(
    jobs: Sequence[Job], engine: Engine, figures: Figures, *, careful: bool
) -> Iterator[tuple[Result, Tensor]]:
    """Each result with its figures on the host; where one is not finite, after a second SVD by the other drivers."""
    failed: list[int] = []
    room = agreed_room(jobs, engine.world)
    # A quarter is for the results that wait to be read back.
    most = min(WINDOW_NUMBERS, room // 4 // compute_dtype(jobs[0].like.dtype).itemsize)
    results = distribute(jobs, engine.world, careful=careful, room=room - room // 4)
    for result, read in _read_back(results, jobs, figures, most):
        if bool(torch.isfinite(read).all()):
            yield result, read
        else:
            failed.append(result.index)
    if failed:
        # All ranks have read the same values.
        results = distribute([jobs[i] for i in failed], engine.world)
        renumbered = (replace(result, index=failed[result.index]) for result in results)
        yield from _read_back(renumbered, jobs, figures, most)


def _read_back(
    results: Iterator[Result], jobs: Sequence[Job], figures: Figures, most: int
) -> Iterator[tuple[Result, Tensor]]:
    """Results with their ``figures`` on the host; a GPU is waited for once for results of up to ``most`` numbers."""
    window: list[Result] = []
    numbers = 0
    for result in chain(results, [None]):
        if result is not None:
            window.append(result)
            numbers += jobs[result.index].size + jobs[result.index].work.numbers
            if numbers <= most:
                continue
        if window:
            heads, more = figures(window)
            sent = torch.cat([torch.cat(heads).double(), more.reshape(-1)]).cpu()
            *firsts, last = sent.split([*map(len, heads), more.numel()])
            for each, *figures_of_it in zip(window, firsts, last.view(more.shape), strict=True):
                yield each, torch.cat(figures_of_it)
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
    return gram_errors([U, V], layout.group)
