"""SVDs of a conversion or an update: of each matrix one, of a Tucker convolution one for each channel mode.

A Tucker layer is factorised by the truncated multilinear SVD of its two channel modes: bases from the SVDs of the
kernel's unfoldings, later of the core's, and the core projected onto them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hpc_oialr.linalg.basis_change import angles_of, orthogonality_error, smallest_cosines
from hpc_oialr.linalg.svd import SVD, compute_dtype
from hpc_oialr.linalg.work_plan import LayerWork
from hpc_oialr.lowrank import TargetWeight
from hpc_oialr.lowrank.kernel_modes import channel_unfoldings, leading_channels
from hpc_oialr.lowrank.tucker import takes_tucker
from hpc_oialr.method.config import OIALRConfig
from hpc_oialr.method.decompositions import Choice, Rotation, core_rotations, low_rank_layer, weight_factors
from hpc_oialr.method.engine import Engine
from hpc_oialr.method.report import ChannelUpdate
from hpc_oialr.method.second_moments import SecondMoments
from hpc_oialr.method.svd_scheduler import Job, distribute


@dataclass(frozen=True)
class ChannelRotation:
    """``U <- U P``, ``Vh <- Q^T Vh`` of a Tucker layer, as a :class:`~hpc_oialr.method.decompositions.Rotation`.

    ``P`` (r_out x values) is whole, ``Q`` (r_in x r_in') cut already; ``spectrum`` is that of the output channels.
    """

    index: int
    core: Tensor
    P: Tensor
    Q: Tensor
    spectrum: Tensor
    figures: dict[str, Any]
    seconds: float

    def cut(self, r: int) -> tuple[Tensor, Tensor, Tensor]:
        """The rotations to the ``r`` output channels to keep, and the new core between them."""
        return leading_channels(self.core, self.P[:, :r], self.Q)

    @property
    def error(self) -> float:
        """The larger orthogonality error of ``U`` and ``Vh`` before the rotation."""
        return float(max(self.figures["orthogonality_error_U"], self.figures["orthogonality_error_Vh"]))


def layer_factors(
    targets: Sequence[TargetWeight], kept: Sequence[int], config: OIALRConfig, engine: Engine, moments: SecondMoments
) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor], Tensor, dict[str, Any]]]:
    """``U``, ``S`` and ``Vh`` of dense layers: index, factors, all k values on the CPU, figures for the report.

    ``kept`` is r, of a Tucker layer that of the output channels; of the input channels as large a share is kept.
    """
    matrices, kernels = _parted(targets, config)
    if matrices:
        parts = [targets[i] for i in matrices], [kept[i] for i in matrices]
        for i, (U, s, Vh), spectrum, figures in weight_factors(*parts, engine, moments):
            yield matrices[i], (U, torch.diag(s), Vh), spectrum, figures
    sizes = []
    for target, r in ((targets[i], kept[i]) for i in kernels):
        k = min(_input_shape(target))
        sizes.append((r, k if r == target.k else config.limits.initial(k)))
    for i, modes, seconds in _mode_svds([targets[i] for i in kernels], sizes, engine):
        target = targets[kernels[i]]
        (s, U), (t, V) = modes
        W = target.weight.detach().reshape(target.shape)
        channels = ChannelUpdate(target.dense_shape[1], len(t), V.shape[1], _report(t))
        yield kernels[i], leading_channels(W, U, V), s.cpu(), {"seconds": seconds, "input_channels": channels}


def layer_rotations(
    targets: Sequence[TargetWeight], choose: Choice, config: OIALRConfig, engine: Engine, moments: SecondMoments
) -> Iterator[Rotation | ChannelRotation]:
    """How the bases of low-rank layers turn; ``choose`` says what is kept of a matrix or of output channels."""
    matrices, kernels = _parted(targets, config)
    if matrices:
        flat = [targets[i] for i in matrices]
        for rotation in core_rotations(flat, engine, moments, lambda *each: choose(*each)[0]):
            yield _at(rotation, matrices)
    cores = [targets[i] for i in kernels]
    sizes = [low_rank_layer(target).inner for target in cores]
    for i, ((s, P), (t, Q)), seconds in _mode_svds(cores, sizes, engine):  # type: ignore[arg-type]
        layer, values = low_rank_layer(cores[i]), t.cpu()
        m, n = _input_shape(cores[i])
        r = config.limits.renewed(config.rule.choose(values, m, n), len(t), min(m, n), 0.0)[0]
        angles = (angles_of(smallest_cosines(basis))[0] for basis in (P, Q))
        figures: dict[str, Any] = dict(zip(("subspace_angle_U", "subspace_angle_Vh"), angles, strict=True))
        figures["orthogonality_error_U"] = orthogonality_error(layer.U)
        figures["orthogonality_error_Vh"] = orthogonality_error(layer.Vh.mT)
        figures["input_channels"] = ChannelUpdate(m, len(Q), r, _report(t))
        core = layer.S.detach().to(P.dtype)
        yield ChannelRotation(kernels[i], core, P, Q[:, :r], s.cpu(), figures, seconds)


def _mode_svds(
    targets: Sequence[TargetWeight], sizes: Sequence[tuple[int, int]], engine: Engine
) -> Iterator[tuple[int, list[tuple[Tensor, Tensor]], float]]:
    """All singular values and ``sizes`` leading vectors of both unfoldings of weights or cores, on every rank.

    Distributed by cost; ``k + m r`` numbers are sent of each m x n unfolding. Raises :class:`NonFiniteError` on every
    rank if an SVD did not converge.
    """
    if not targets:
        return
    jobs = [_job(target, mode, size[mode]) for target, size in zip(targets, sizes, strict=True) for mode in (0, 1)]
    waiting: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}
    seconds: dict[int, float] = {}
    for result in distribute(jobs, engine.world):
        i, mode = divmod(result.index, 2)
        s, vectors = result.values
        found = waiting.setdefault(i, {})
        found[mode] = (s, vectors)
        seconds[i] = seconds.get(i, 0.0) + result.seconds
        if len(found) == 2:
            del waiting[i]
            yield i, [found[0], found[1]], seconds[i]


def _job(target: TargetWeight, mode: int, size: int) -> Job:
    layer = target.low_rank
    channels = target.dense_shape[1] if layer is None else len(layer.Vh)
    rows = (len(target.trained), channels)[mode]
    columns = target.trained.numel() // rows

    def prepare() -> Tensor:
        tensor = target.trained.detach()
        return channel_unfoldings(tensor.to(compute_dtype(tensor.dtype)), channels)[mode]

    def pack(factors: SVD) -> Sequence[Tensor]:
        return factors.s, factors.U[:, :size]

    k = min(rows, columns)
    work = LayerWork(f"{target.name} ({('output', 'input')[mode]} channels)", rows, columns)
    return Job(work, prepare, pack, [(k,), (rows, min(size, k))], target.trained)


def _parted(targets: Sequence[TargetWeight], config: OIALRConfig) -> tuple[list[int], list[int]]:
    """Indices of matrices and of Tucker layers."""
    kernels = [i for i, target in enumerate(targets) if takes_tucker(target, config.conv)]
    return [i for i in range(len(targets)) if i not in kernels], kernels


def _input_shape(target: TargetWeight) -> tuple[int, int]:
    """Of the weight's unfolding by its input channels."""
    m, channels, *extents = target.dense_shape
    return channels, m * math.prod(extents)


def _report(s: Tensor) -> Tensor:
    return s.float().cpu().clone()


def _at(rotation: Rotation, indices: Sequence[int]) -> Rotation:
    return replace(rotation, index=indices[rotation.index])
