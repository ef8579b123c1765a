"""Sketches of low-rank layers' weight gradients in the last steps before an update, and the directions they add.

With frozen bases the gradient of the weight, ``G = dy^T x`` (m x n), is never formed, and what of it lies outside of
``U`` and ``Vh`` is lost. Two random projections of its sum over some steps tell where that is: ``Y = G Omega`` has the
leading directions of its columns, ``Z = Psi^T G`` those of its rows (N. Halko et al., arXiv 0909.4061; J. Tropp et al.,
arXiv 1609.00048). Both are linear in G, so they are sums over tokens, steps and ranks.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hpc_oialr.errors import ConfigError
from hpc_oialr.linalg.arithmetic import exact_arithmetic, without_autocast
from hpc_oialr.linalg.svd import compute_dtype
from hpc_oialr.linalg.tsqr import tsqr, tsqr_svd
from hpc_oialr.lowrank import LowRankWeight, TargetWeight
from hpc_oialr.lowrank.layout import Replicated
from hpc_oialr.method.config import OIALRConfig
from hpc_oialr.method.engine import Engine
from hpc_oialr.method.gathering import Gatherer, LayerSums

# Random directions are added to a sketch at this size, relative to it: they take the places of those that it lacks, where
# the gradient has fewer directions outside of the bases than are to be added.
FILL = 1e-4


class LayerSketches(LayerSums):
    """``Y`` (m x q) and ``Z`` (q x n) of one low-rank layer.

    The test matrices ``Omega`` (n x q) and ``Psi`` (m x q) depend on the layer's name and the number of the update alone:
    they are the same on every rank and after a resume.
    """

    def __init__(self, target: TargetWeight, q: int, update: int) -> None:
        (m, n), core = target.shape, target.trained
        super().__init__(target, {"Y": (m, q), "Z": (q, n)}, compute_dtype(core.dtype), core.device)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{update} {target.name}".encode()))
        drawn = (torch.randn(rows, q, generator=generator, device="cpu", dtype=torch.float32) for rows in (n, m))
        self.Omega, self.Psi = (matrix.to(self.flat) for matrix in drawn)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        """A copy of the output, whose gradient comes by here, together with the input."""
        x: Any = next(iter((*args, *kwargs.values())), None)
        if not (_is_plain(x) and _is_plain(output) and output.requires_grad and self._counts(module)):
            return None
        copy: Tensor = _Tap.apply(output, x.detach(), weakref.ref(self), module)  # type: ignore[no-untyped-call]
        return copy

    @torch.no_grad()
    def add(self, module: Any, x: Tensor, dy: Tensor) -> None:
        """Add a pass with inputs ``x`` and gradients ``dy`` of the outputs: ``2 B q (m + n)`` multiply-adds for B tokens.

        They are computed in the dtype of the gradients, or in fp32 if that is fp16.
        """
        dtype = torch.float32 if dy.dtype == torch.float16 else dy.dtype
        x, dy, Omega, Psi = (part.to(dtype) for part in (x, dy, self.Omega, self.Psi))
        with without_autocast():
            if isinstance(module, nn.modules.conv._ConvNd):
                found = _of_convolution(module, x, dy, Omega, Psi)
            else:
                # transformers' Conv1D stores its weight input by output.
                left, right = (x, dy) if self.target.kind == "Conv1D" else (dy, x)
                left, right = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
                found = left.mT @ (right @ Omega), (left @ Psi).mT @ right
            # Where a loss scale was too large gradients are not finite, and the step is not taken.
            finite = torch.stack([part.isfinite().all() for part in found]).all()
            for total, part in zip(self.totals().values(), found, strict=True):
                total += torch.where(finite, part, 0.0)

    @exact_arithmetic()
    def outside(self, U: Tensor, Vh: Tensor, count: int, layout: Replicated) -> tuple[Tensor, Tensor]:
        """``count`` directions for each basis, orthonormal and orthogonal to it: m_p x count and count x n_p.

        From this rank's rows of ``U`` and columns of ``Vh``. The leading ones of what the sketches have outside; random
        ones where that is too few. About ``24 r q (m + n)`` operations, and of each side an SVD and a QR of q columns.
        Where bases are sharded, 12 all-reduces of r q numbers and the messages of
        :func:`~hpc_oialr.linalg.tsqr.tsqr_svd`.
        """
        totals, rows, columns = self.totals(), layout.own_rows(len(self.Psi)), layout.own_columns(len(self.Omega))
        left = _outside(U, totals["Y"][rows], self.Psi[rows], count, layout)
        right = _outside(Vh.mT, totals["Z"].mT[columns], self.Omega[columns], count, layout)
        return left, right.mT.contiguous()


class _Tap(torch.autograd.Function):
    """The identity; its backward pass sketches the gradient with the saved input.

    An ordinary node of the graph, so that recomputed activations and accumulated passes are counted once.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, sketches: Any, module: nn.Module) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sketches, ctx.module = sketches, module
        return output.clone()  # a view could not be written into by the layers that follow

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if (sketches := ctx.sketches()) is not None:
            sketches.add(ctx.module, *ctx.saved_tensors, dy)
        return dy, None, None, None


def _is_plain(x: Any) -> bool:
    ordinary = isinstance(x, Tensor) and not isinstance(x, DTensor)
    return ordinary and not x.is_nested and x.layout is torch.strided and x.is_floating_point()


def _of_convolution(module: Any, x: Tensor, dy: Tensor, Omega: Tensor, Psi: Tensor) -> tuple[Tensor, Tensor]:
    """``Y`` and ``Z`` with q filters in place of the layer's m: any padding, stride and dilation."""
    channel = x.dim() - len(module.kernel_size) - 1
    with torch.enable_grad():
        filters = Omega.mT.reshape(-1, *module.dense_shape[1:]).requires_grad_()
        a = module._conv_forward(x, filters, None)
    db = (dy.movedim(channel, -1) @ Psi).movedim(-1, channel)
    (Z,) = torch.autograd.grad(a, filters, db)
    left, right = (part.detach().movedim(channel, -1).reshape(-1, part.shape[channel]) for part in (dy, a))
    return left.mT @ right, Z.reshape(len(Z), -1)


def _outside(basis: Tensor, sketch: Tensor, random: Tensor, count: int, layout: Replicated) -> Tensor:
    """The leading ``count`` directions of a sketch outside of a basis; all in row blocks."""

    def project(part: Tensor) -> Tensor:
        for _ in range(2):  # rounding leaves some of it inside
            part = part - basis @ layout.add(basis.mT @ part)
        return part / layout.add(part.square().sum()).sqrt().clamp_min(torch.finfo(part.dtype).tiny)

    sketch = project(sketch.to(basis.dtype)) + FILL * project(random.to(basis.dtype))
    leading = tsqr_svd(sketch, layout.group, name="a sketch").U[:, :count]
    # The smallest directions may have lost their orthogonality to the basis, relative to their size.
    return tsqr(project(leading), layout.group, name="a sketch").Q.contiguous()


class GradientSketches(Gatherer[LayerSketches]):
    """Gathers the sketches of the low-rank layers that the next update reaches; nothing if bases do not grow.

    In these steps a layer keeps its input for the backward pass, as a dense one does, and ``2 q (m + n)`` numbers of
    sketches and test matrices on every rank, also where factors are sharded. q is the largest number of directions that
    the update may add: ``OIALRConfig.grow`` of r, or as many as fill up r to a multiple of ``RankLimits.round_to``.

    Raises :class:`ConfigError` if the engine's layers do not see whole inputs and gradients.
    """

    kind, without = "sketches", "does not grow"

    def __init__(self, config: OIALRConfig, engine: Engine) -> None:
        super().__init__(config, engine)
        if config.grow and not engine.whole_features:
            where = f"under {type(engine).__name__} layers see parts of them"
            rule = f"new directions come from layers' inputs and gradients, but {where}"
            raise ConfigError("grow", config.grow, rule, fix="Set it to 0.")

    def near(self, t: int) -> bool:
        """Whether an update is near at which bases grow."""
        return bool(self._config.grow) and self._config.next_update(t) - self._config.steps_of_growth <= t

    def watch(self, t: int, update: int, targets: Sequence[TargetWeight], streaks: Mapping[str, int]) -> None:
        """Watch the layers that the next update reaches, in its last steps."""
        config = self._config
        if not config.grow:
            return
        if t == config.next_update(t - 1):
            self._sums.clear()
        begun = config.next_update(t) - config.steps_of_growth
        self._late = not self._sums and t > max(0, begun)
        found = [target for target in targets if begun <= t and self._most(target) > 0]
        self._open(found, lambda each: LayerSketches(each, self._most(each), update))

    def _most(self, target: TargetWeight) -> int:
        """The most directions that an update may add, whatever the singular values are."""
        layer = target.low_rank
        if layer is None or layer.bases_trained:
            return 0
        return self._config.limits.most_new(layer.r, layer.k, self._config.grow)

    def reduce(self, targets: Iterable[TargetWeight]) -> dict[LowRankWeight, LayerSketches]:
        """The sketches of these layers over all ranks, without those that saw no pass; a collective call.

        An all-reduce of ``q (m + n)`` numbers a layer.
        """
        found: dict[LowRankWeight, LayerSketches] = {}
        for target in (target for target in targets if self.watches(target)):
            sums = self._reduced(target)
            if target.low_rank is not None and bool(sums.flat.any()):
                found[target.low_rank] = sums
            else:
                self._tell(target, "no training pass in eager mode")
        return found
