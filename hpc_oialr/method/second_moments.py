"""Second moments of layers' inputs and output gradients, gathered in the last steps before a conversion or an update."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hpc_oialr.linalg.arithmetic import without_autocast
from hpc_oialr.linalg.svd import SVD, compute_dtype
from hpc_oialr.linalg.weighted_svd import weighted_svd, weighted_values
from hpc_oialr.lowrank import LowRankWeight, TargetWeight
from hpc_oialr.lowrank.base import whole_shape
from hpc_oialr.lowrank.tucker import takes_tucker
from hpc_oialr.method.config import OIALRConfig
from hpc_oialr.method.engine import Engine
from hpc_oialr.method.gathering import Gatherer, LayerSums

log = logging.getLogger(__name__)

# Up to this many features a dense layer's moments are a full matrix.
FULL = 4096
# Of a pass so many tokens for each feature are counted, but at least LEAST: more cost time and add little.
TOKENS, LEAST = 4, 1024
# Tokens are taken at multiples of this prime, modulo their number: spread over samples and places in them.
SPREAD = 2_654_435_761


class Moments(NamedTuple):
    """Of the rows of a matrix (m) and of its columns (n): c x c, or c for a diagonal; None where nothing was seen.

    For a convolution of overlapping patches c is the number of input channels, and the same moments stand for all
    places in the kernel.
    """

    left: Tensor | None
    right: Tensor | None

    def within(self, U: Tensor, Vh: Tensor) -> Moments:
        """In bases: ``U^T left U`` and ``Vh right Vh^T``."""
        return Moments(_within(self.left, U.mT), _within(self.right, Vh))


NOTHING = Moments(None, None)


def _within(moments: Tensor | None, basis: Tensor) -> Tensor | None:
    if moments is None:
        return None
    k, moments = len(basis), moments.to(basis.dtype)
    by_channel = basis.reshape(k, len(moments), -1)
    product = moments[:, None] * by_channel if moments.dim() == 1 else moments @ by_channel
    return product.reshape(k, -1) @ basis.mT


class MomentSums(LayerSums):
    """Second moments of one layer's inputs and output gradients."""

    def __init__(self, target: TargetWeight, importance: str, moments: str) -> None:
        layer, trained = target.low_rank, target.trained
        # The sides of inputs and of gradients: transformers' Conv1D stores its weight input by output.
        self._sides = ("left", "right") if target.kind == "Conv1D" else ("right", "left")
        sides = self._sides if importance == "inputs and gradients" else self._sides[:1]
        columns = target.shape[1] if _takes_patches(target.holder) else whole_shape(trained)[1]
        features = {"left": target.shape[0], "right": columns}
        shapes: dict[str, Sequence[int]] = {}
        for side in sides:
            c = features[side] if layer is None else layer.r
            full = layer is not None or (moments == "full" and c <= FULL)
            shapes[side] = (c, c) if full else (c,)
        # n^2 numbers of every dense layer would raise a GPU's peak above that of dense training.
        device = trained.device if layer is not None else "cpu"
        super().__init__(target, shapes, compute_dtype(trained.dtype), device)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add the inputs of a training pass."""
        if not self._counts(module):
            return
        inputs = [*args, *kwargs.values()][:1]
        if isinstance(module, nn.MultiheadAttention):
            inputs = self._attended(args, kwargs)
        for x in inputs:
            self._add(module, x, self._sides[0])

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Add the gradients of the output, once they are there."""
        # An attention's output, a tuple, is not that of its input projection.
        wanted = len(self._shapes) > 1 and isinstance(output, Tensor) and output.requires_grad
        if wanted and self._counts(module):
            reference = weakref.ref(self)

            def add(gradient: Tensor) -> None:
                if (sums := reference()) is not None:
                    sums._add(module, gradient, sums._sides[1])

            output.register_hook(add)

    def _attended(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The inputs of a dense attention's projection, each once."""
        names = ("query", "key", "value")
        given = dict(zip(names, args, strict=False)) | {key: kwargs[key] for key in names if key in kwargs}
        alone = {"q_proj_weight": "query", "k_proj_weight": "key", "v_proj_weight": "value"}
        if (name := alone.get(self.target.parameter)) is not None:
            return [given[name]]
        return list({id(x): x for x in given.values()}.values())

    @torch.no_grad()
    def _add(self, module: nn.Module, x: Tensor, side: str) -> None:
        """Add ``x^T x``, with x as tokens x features; of a low-rank layer tokens x r.

        Of ``max(4 c, 1024)`` tokens, with c features, if there are more.
        """
        if type(x) not in (Tensor, nn.Parameter) or x.is_nested or x.layout is not torch.strided:
            return
        with without_autocast():
            total = self.totals()[side]
            x = _features(module, x, side, max(TOKENS * len(total), LEAST)).to(total.dtype)
            product = x.mT @ x if total.dim() == 2 else x.square().sum(0)
            # Where a loss scale was too large gradients are not finite, and the step is not taken.
            total += torch.where(torch.isfinite(product).all(), product, 0.0).to(total.device)


def _features(module: Any, x: Tensor, side: str, most: int) -> Tensor:
    """At most so many tokens of ``x`` as tokens x features; in the bases of a low-rank layer."""
    basis, convolution = None, isinstance(module, nn.modules.conv._ConvNd)
    if isinstance(module, LowRankWeight):
        basis = module.U if side == "left" else module.Vh.mT
        if convolution and side == "right":
            filters = module.Vh.to(x.dtype).reshape(module.r, *module.dense_shape[1:])
            x, basis = module._conv_forward(x, filters, None), None  # type: ignore[operator]
    if convolution:
        channel = x.dim() - len(module.kernel_size) - 1
        if basis is None and side == "right" and _takes_patches(module):
            for i, extent in enumerate(module.kernel_size, start=channel + 1):
                x = x.unfold(i, extent, extent)
            x = x.movedim(channel, -1 - len(module.kernel_size)).flatten(-1 - len(module.kernel_size))
        else:
            x = x.movedim(channel, -1)
    x = x.reshape(-1, x.shape[-1])
    if len(x) > most:
        x = x[torch.arange(most, device=x.device) * SPREAD % len(x)]
    return x if basis is None else x @ basis.to(x.dtype)


def _takes_patches(module: Any) -> bool:
    """Whether a dense convolution sees each number once, as a patch embedding: a linear layer on patches."""
    convolution, low_rank = isinstance(module, nn.modules.conv._ConvNd), isinstance(module, LowRankWeight)
    if low_rank or not convolution:
        return False
    unpadded = not isinstance(module.padding, str) and not any(module.padding)
    return unpadded and module.stride == module.kernel_size and set(module.dilation) == {1}


class SecondMoments(Gatherer[MomentSums]):
    """Gathers the moments of the layers that change next; nothing if bases are chosen by the weights alone.

    While dense layers are watched, n^2 numbers a layer on every rank, in the host's memory (m^2 more with gradients);
    ``B n^2`` multiply-adds a step of B tokens, at most ``max(4 n, 1024)`` of them. For low-rank ones r^2 numbers on the
    device and ``B r (n + r)`` multiply-adds, B at most ``max(4 r, 1024)``.

    Raises :class:`ConfigError` if the engine's layers do not see whole inputs.
    """

    kind, without = "moments", "is cut by its weight alone"

    def __init__(self, config: OIALRConfig, engine: Engine) -> None:
        super().__init__(config, engine)
        self._kept: dict[str, Moments] = {}  # of layers that change in this step
        name = type(engine).__name__
        self.importance = config.importance_under(name, engine.importances)
        if self.importance == "weights" and config.importance == "auto":
            log.info(
                "bases are chosen by the weights alone (importance): under %s no layer sees its inputs whole", name
            )

    def near(self, t: int) -> bool:
        """Whether a conversion or an update is near that cuts by moments."""
        config = self._config
        conversion = config.next_conversion(t) - config.moments_steps
        update = config.next_update(t) - config.moments_steps_of_updates
        return self.importance != "weights" and min(conversion, update) <= t

    def watch(self, t: int, update: int, targets: Sequence[TargetWeight], streaks: Mapping[str, int]) -> None:
        """Watch those layers that may be cut in a few steps."""
        config = self._config
        self._kept.clear()
        if self.importance == "weights":
            return
        if t in (config.next_conversion(t - 1), config.next_update(t - 1)):
            self._sums.clear()  # a change ends all windows
        found: list[TargetWeight] = []
        begun = config.next_conversion(t) - config.moments_steps
        self._late = not self._sums and t > max(0, begun)
        if begun <= t:
            least = 0 if config.stability_threshold is None else config.stability_patience - 1
            dense = [each for each in targets if each.low_rank is None and not takes_tucker(each, config.conv)]
            stable = (target for target in dense if streaks.get(target.name, 0) >= least)
            found += [target for target in stable if config.limits.initial(target.k) < target.k]
        begun = config.next_update(t) - config.moments_steps_of_updates
        if begun <= t:
            found += [target for target in targets if self._may_fall(target)]
            self._late |= not self._sums and t > max(0, begun)
        self._open(found, lambda each: MomentSums(each, self.importance, config.moments))

    def _may_fall(self, target: TargetWeight) -> bool:
        layer, config = target.low_rank, self._config
        if layer is None or takes_tucker(target, config.conv):
            return False
        return config.may_fall(layer.m, layer.n, layer.r, 0.0 if layer.bases_trained else config.grow)

    def turn(self, target: TargetWeight, left: Tensor, right: Tensor) -> None:
        """Follow a low-rank layer's bases to ``U left`` and ``right^T Vh``."""
        if (sums := self._sums.get(target.name)) is not None:
            for side, total in sums.totals().items():
                turn = left if side == "left" else right
                total.copy_(turn.mT @ total @ turn)

    def watches(self, target: TargetWeight) -> bool:
        """Whether a layer's moments are gathered, or kept; the same on every rank."""
        return super().watches(target) or target.name in self._kept

    def reduce(self, target: TargetWeight, *, keep: bool = False) -> Moments:
        """The moments of a watched layer over all ranks, up to a factor; a collective call.

        Its sums are freed; what this returns as well, unless it is asked for again (``keep``).
        """
        found = self._kept.pop(target.name, None) or self._moments_of(target)
        if keep:
            self._kept[target.name] = found
        return found

    def _moments_of(self, target: TargetWeight) -> Moments:
        totals = self._reduced(target).totals()
        # Sums of squares, whose diagonal is 0 only where nothing was added.
        squares = {side: total.diagonal() if total.dim() == 2 else total for side, total in totals.items()}
        seen = {side: total for side, total in totals.items() if float(squares[side].sum()) != 0}
        if not seen:
            self._tell(target, "no training pass in eager mode")
        return Moments(seen.get("left"), seen.get("right"))


def approximate(factors: SVD, r: int, moments: Moments) -> tuple[SVD, Tensor]:
    """``U diag(s) Vh`` cut to ``r``, and the share lost; by its largest values where nothing was seen."""
    U, s, Vh = factors
    inner = moments.within(U, Vh)
    if r == len(s):
        return factors, s.new_zeros(())
    (P, values, Qh), lost = weighted_svd(torch.diag(s), r, *inner)
    return SVD(U @ P, values, Qh @ Vh), lost


def importance_values(factors: SVD, moments: Moments) -> Tensor:
    """How much directions of ``U diag(s) Vh`` matter, descending: roots of what they add to output or loss."""
    U, s, Vh = factors
    return weighted_values(torch.diag(s), *moments.within(U, Vh))


def approximate_shards(
    factors: SVD, r: int, moments: Moments, shape: tuple[int, int], engine: Engine
) -> tuple[SVD, Tensor]:
    """:func:`approximate` with this rank's rows of ``U`` and columns of ``Vh``; a collective call.

    All ranks compute it; rank 0's result is used, k r numbers twice.
    """
    (U, s, Vh), layout = factors, engine.layout
    left = None if moments.left is None else layout.whole_columns(U.mT.contiguous(), shape[0])
    right = None if moments.right is None else layout.whole_columns(Vh, shape[1])
    inner = Moments(
        None if left is None else _within(moments.left, left),
        None if right is None else _within(moments.right, right),
    )
    chosen, lost = weighted_svd(torch.diag(s), r, *inner)
    P, values, Qh = (part.contiguous() for part in chosen)
    engine.world.share([P, values, Qh, lost])
    return SVD(U @ P, values, Qh @ Vh), lost
