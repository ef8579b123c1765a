"""One layer's change of basis, with everything that must follow it: optimizer, averages, step size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpc_oialr.engines import Engine
from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.linalg.svd import compute_dtype
from hpc_oialr.linalg.tsqr import tsqr
from hpc_oialr.lowrank import LowRankWeight, Site, select
from hpc_oialr.lowrank.autocast_copies import AutocastCopies
from hpc_oialr.lowrank.conversion import convert_site, leave_fused_inference, make_shell
from hpc_oialr.lowrank.execution import crossover_by_dtype
from hpc_oialr.method.config import OIALRConfig
from hpc_oialr.optim.core_lr import CoreLearningRate, core_factor
from hpc_oialr.optim.stack import OptimizerStack
from hpc_oialr.optim.state import order_cores, replace_parameter, transform_average, transform_state


class BasisChanges:
    """Applies conversions and rotations to a model, its optimizer and its running averages.

    Parameters
    ----------
    optimizer
        Its groups keep their order; a core takes the place of its weight.
    averages
        Copies of the model with averaged weights, e.g. ``torch.optim.swa_utils.AveragedModel``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerStack,
        config: OIALRConfig,
        averages: Sequence[nn.Module],
        engine: Engine,
    ) -> None:
        self.optimizer, self.config = optimizer, config
        self.engine, self.layout = engine, engine.layout
        self.core_lr = CoreLearningRate(optimizer.leaves)
        engine.scale_steps(self.core_lr.factors)
        self.factor_dtype = getattr(torch, config.factor_dtype) if config.factor_dtype else None
        self.crossover = (
            config.crossover
            if not isinstance(config.crossover, str)
            else crossover_by_dtype(config.crossover)
        )
        self._averages = [self._sites_by_name(average) for average in averages]
        leave_fused_inference(model)

    def _sites_by_name(self, average: nn.Module) -> dict[str, Site]:
        leave_fused_inference(average)
        inner = getattr(average, "module", average)
        return {site.name: site for site in select(inner, self.config.selection, frozen=True)}

    @exact_arithmetic()
    def convert(self, site: Site, U: Tensor, s: Tensor, Vh: Tensor) -> None:
        """``W -> U diag(s) Vh``; the dense weight, its gradient and its moments are freed.

        Parameters
        ----------
        U, s, Vh
            This process's rows of m x r, all r values, and its columns of r x n.
        """
        weight, layout, (m, n) = site.weight, self.layout, site.shape
        reset = not self.config.carry_moments
        self.engine.open_state(weight)
        transform_state(self.optimizer, weight, U, layout.whole_columns(Vh, n), layout=layout, reset=reset)
        stored = (layout.put_rows(U, m), layout.put_core(torch.diag(s)), layout.put_columns(Vh, n))
        layer = self._convert(site, *stored)
        layer.autocast_copies = AutocastCopies() if self.engine.whole_factors else None
        replace_parameter(self.optimizer, weight, layer.S)
        self._set_step(layer)
        self.engine.follow(layer)
        for average in self._averages:
            twin = average[site.name]
            average_core = transform_average(twin.weight, U, Vh)
            self._convert(twin, U.clone(), average_core, Vh.clone()).S.requires_grad_(False)

    def _convert(self, site: Site, U: Tensor, S: Tensor, Vh: Tensor) -> LowRankWeight:
        return convert_site(site, U, S, Vh, factor_dtype=self.factor_dtype, crossover=self.crossover)

    def shell(self, site: Site, r: int) -> None:
        """Convert to zero factors of inner dimension ``r``; a checkpoint fills them."""
        weight = site.weight
        options: dict[str, Any] = {"factor_dtype": self.factor_dtype, "crossover": self.crossover}
        layer = make_shell(site, r, layout=self.layout, **options)
        layer.autocast_copies = AutocastCopies() if self.engine.whole_factors else None
        replace_parameter(self.optimizer, weight, layer.S)
        self._set_step(layer)
        self.engine.follow(layer)
        for average in self._averages:
            twin = make_shell(average[site.name], r, **options)
            twin.S.requires_grad_(False)

    def order(self, sites: Sequence[Site]) -> None:
        """Sort what conversions in any order, on any number of processes, have put into the optimizer."""
        order_cores(self.optimizer, [site.trained for site in sites])

    @exact_arithmetic()
    def rotate(
        self, layer: LowRankWeight, name: str, P: Tensor, s: Tensor, Qh: Tensor, *, repair: bool
    ) -> bool:
        """``U <- U P``, ``Vh <- Qh Vh``, ``S <- diag(s)``; returns whether r changed.

        Parameters
        ----------
        P, s, Qh
            r x r', r' and r' x r, already cut to the new r'.
        repair
            Re-orthogonalise the new bases by QR, ``U = Q R``, with both R folded into S.
        """
        dtype, layout, core = compute_dtype(layer.S.dtype), self.layout, layer.S
        U, S, Vh = layout.rows(layer.U).to(dtype) @ P, torch.diag(s), Qh @ layout.columns(layer.Vh).to(dtype)
        if repair:
            U, S, Vh = reorthogonalise(U, S, Vh, layout.group)
        reset = not self.config.carry_moments and len(s) < layer.r
        self.engine.open_state(core)
        transform_state(self.optimizer, core, P, Qh, layout=layout, core=True, reset=reset)
        U, S, Vh = layout.put_rows(U, layer.m), layout.put_core(S), layout.put_columns(Vh, layer.n)
        for average in self._averages:
            twin = average[name].low_rank
            assert twin is not None
            twin.set_factors(U.clone(), transform_average(twin.S, P, Qh), Vh.clone())
        reshaped = layer.set_factors(U, S, Vh)
        if reshaped:
            replace_parameter(self.optimizer, core, layer.S)
            self._set_step(layer, replaces=core)
        self.engine.follow(layer)
        return reshaped

    def _set_step(self, layer: LowRankWeight, replaces: nn.Parameter | None = None) -> None:
        factor = core_factor(self.optimizer, layer.S, layer.m, layer.n, self.config.core_lr_scale)
        self.core_lr.set(layer.S, factor, replaces=replaces)


def reorthogonalise(
    U: Tensor, S: Tensor, Vh: Tensor, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal bases of the same product: ``U = Q1 R1``, ``Vh^T = Q2 R2``, ``S <- R1 S R2^T``.

    Signs are chosen so that both R have positive diagonals and the bases hardly turn. With a ``group``
    each process has some of the rows of ``U`` and of the columns of ``Vh``.
    """
    Q1, R1 = _positive_qr(U, group)
    Q2, R2 = _positive_qr(Vh.mT, group)
    return Q1, R1 @ S @ R2.mT, Q2.mT


def _positive_qr(A: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    Q, R = tsqr(A, group)
    signs = torch.where(R.diagonal() < 0, -1.0, 1.0).to(A.dtype)
    return Q * signs, signs[:, None] * R
