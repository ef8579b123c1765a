"""The SVDs of an event: one layer a process where matrices are whole, all processes on each where they are split."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hpc_oialr.linalg.basis_change import angles_of, gram_error
from hpc_oialr.linalg.svd import SVD, compute_dtype
from hpc_oialr.linalg.tsqr import tsqr_svd
from hpc_oialr.linalg.work_plan import LayerWork
from hpc_oialr.lowrank import LowRankWeight, TargetWeight
from hpc_oialr.method.engine import Engine
from hpc_oialr.method.stability import rotation_cosines, rotation_stability
from hpc_oialr.method.svd_scheduler import Job, Result, distribute

# Of the results that wait on a GPU to be read back together, with what an engine may bring to hand a core out:
# 256 MiB in fp32. All 73 layers of a ViT-B/16 at r = k/2 have 0.2 of it in results.
WINDOW_NUMBERS = 1 << 26


@dataclass(frozen=True)
class Factors:
    """A weight's leading factors.

    Attributes
    ----------
    index
        Which of the targets.
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
    """A core's factors ``S = P diag(s) Qh``, whole on every process, and what was read back of them.

    Attributes
    ----------
    index
        Which of the targets.
    P, s, Qh
        On the device.
    spectrum
        ``s`` on the CPU.
    stability, angles
        Of the bases against those before; see :mod:`hpc_oialr.method.stability`.
    errors
        Orthogonality errors of ``U`` and ``Vh`` before.
    seconds
        Time of the SVD where it was done (s); 0 elsewhere.
    """

    index: int
    P: Tensor
    s: Tensor
    Qh: Tensor
    spectrum: Tensor
    stability: float
    angles: tuple[float, float]
    errors: tuple[float, float]
    seconds: float


def weight_factors(targets: Sequence[TargetWeight], kept: Sequence[int], engine: Engine) -> Iterator[Factors]:
    """``W = U diag(s) Vh`` of dense layers, one after another; the first ``kept`` columns and rows.

    Whole weights are dealt over the processes by cost; what is sent is ``r (m + n) + k`` numbers a layer.
    Of a weight in row blocks each process works on its own, which it never shows to another: it sends
    triangles of at most k^2 numbers log2 P times, and no process holds more than ``k max(m, n)`` numbers
    beside its block, of one layer at a time.
    """
    return _dealt(targets, kept, engine) if engine.layout.group is None else _blockwise(targets, kept, engine)


def _dealt(targets: Sequence[TargetWeight], kept: Sequence[int], engine: Engine) -> Iterator[Factors]:
    jobs = [_weight_job(target, r, engine) for target, r in zip(targets, kept, strict=True)]
    for result in distribute(jobs, engine.world):
        (m, n), k, r = targets[result.index].shape, targets[result.index].k, kept[result.index]
        s, U, Vh = result.values.split([k, m * r, r * n])
        yield Factors(result.index, U.view(m, r), s, Vh.view(r, n), result.seconds)


def _weight_job(target: TargetWeight, r: int, engine: Engine) -> Job:
    (m, n), k = target.shape, target.k

    def prepare() -> Tensor:
        engine.gather(target)
        return target.weight.detach().reshape(m, n)

    def pack(factors: SVD) -> Tensor:
        U, s, Vh = factors
        return torch.cat([s, U[:, :r].reshape(-1), Vh[:r].reshape(-1)])

    return Job(LayerWork(target.name, m, n), prepare, pack, k + r * (m + n), target.weight)


def _blockwise(targets: Sequence[TargetWeight], kept: Sequence[int], engine: Engine) -> Iterator[Factors]:
    for index, (target, r) in enumerate(zip(targets, kept, strict=True)):
        start = time.perf_counter()
        U, s, Vh = split_svd(target, engine)
        yield Factors(index, U[:, :r], s, Vh[:r], time.perf_counter() - start)


def split_svd(target: TargetWeight, engine: Engine) -> tuple[Tensor, Tensor, Tensor]:
    """Of a dense layer's weight in row blocks: this process's rows of U, s, its columns of Vh; a collective call."""
    engine.gather(target)
    layout = engine.layout
    U, s, Vh, _ = tsqr_svd(layout.rows(target.weight), layout.group, name=target.name)
    return U, s, Vh[:, layout.own_columns(target.shape[1])]


def core_rotations(targets: Sequence[TargetWeight], engine: Engine) -> Iterator[Rotation]:
    """``S = P diag(s) Qh`` of low-rank layers, dealt over the processes; sends ``2 r^2 + r + 4`` numbers a layer.

    On a GPU the host waits once for the figures of all layers, or of as many as :data:`WINDOW_NUMBERS` allows.

    Raises
    ------
    NonFiniteError
        On every process, if no SVD of a core converged.
    """
    jobs = [_core_job(target, engine) for target in targets]
    failed: list[int] = []
    for results in _windows(distribute(jobs, engine.world, careful=False), jobs):
        for rotation in _read_back(results, targets, engine):
            # Not finite wherever any value of P or Qh is not.
            if math.isfinite(rotation.stability) and bool(torch.isfinite(rotation.spectrum).all()):
                yield rotation
            else:
                failed.append(rotation.index)
    # All processes have read the same values. What the first driver could not do goes through all others.
    for result in distribute([jobs[i] for i in failed], engine.world) if failed else ():
        yield from _read_back([replace(result, index=failed[result.index])], targets, engine)


def _windows(results: Iterable[Result], jobs: Sequence[Job]) -> Iterator[list[Result]]:
    """Results in groups: on a CPU one by one, since nothing is won by keeping them."""
    most = WINDOW_NUMBERS if jobs and jobs[0].like.is_cuda else 0
    window: list[Result] = []
    numbers = 0.0
    for result in results:
        window.append(result)
        numbers += jobs[result.index].size + (jobs[result.index].work.held or 0)
        if numbers > most:
            yield window
            window, numbers = [], 0.0
    if window:
        yield window


def _read_back(
    results: Sequence[Result], targets: Sequence[TargetWeight], engine: Engine
) -> Iterator[Rotation]:
    """Wait for the figures of all ``results`` together."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    figures: list[Tensor] = []
    for result in results:
        layer = _layer(targets[result.index])
        r = layer.r
        s, P, Qh, cosines, errors = result.values.split([r, r * r, r * r, 2, 2])
        if engine.layout.group is not None:
            errors = _errors(layer, engine)
        P, Qh = P.view(r, r), Qh.view(r, r)
        parts.append((P, s, Qh))
        figures += [s.double(), rotation_stability(P, Qh)[None], cosines.double(), errors.double()]
    read = torch.cat(figures).cpu().split([len(s) + 5 for _, s, _ in parts])
    for result, (P, s, Qh), values in zip(results, parts, read, strict=True):
        spectrum, rest = values.split([len(s), 5])
        angle_U, angle_Vh = angles_of(rest[1:3])
        stability, _, _, error_U, error_Vh = rest.tolist()
        yield Rotation(
            index=result.index,
            P=P,
            s=s,
            Qh=Qh,
            spectrum=spectrum.to(s.dtype),
            stability=stability,
            angles=(angle_U, angle_Vh),
            errors=(error_U, error_Vh),
            seconds=result.seconds,
        )


def _core_job(target: TargetWeight, engine: Engine) -> Job:
    layer = _layer(target)
    r = layer.r

    def prepare() -> Tensor:
        engine.gather(target)
        return engine.layout.core(layer.S)

    def pack(factors: SVD) -> Tensor:
        P, s, Qh = factors
        # Of split bases all processes measure the errors together, afterwards.
        errors = _errors(layer, engine) if engine.layout.group is None else s.new_zeros(2)
        return torch.cat([s, P.reshape(-1), Qh.reshape(-1), rotation_cosines(P, Qh), errors.to(s)])

    # Some engines bring U and Vh too when they open a layer.
    work = LayerWork(target.name, r, r, held=r * (r + sum(target.shape)))
    return Job(work, prepare, pack, r + 2 * r * r + 4, layer.S)


def _layer(target: TargetWeight) -> LowRankWeight:
    assert target.low_rank is not None
    return target.low_rank


def _errors(layer: LowRankWeight, engine: Engine) -> Tensor:
    layout, dtype = engine.layout, compute_dtype(layer.S.dtype)
    U, V = layout.rows(layer.U).to(dtype), layout.columns(layer.Vh).mT.to(dtype)
    return torch.stack([gram_error(U, layout.group), gram_error(V, layout.group)])
