"""Rules that choose the inner dimension r from the singular values, and their limits."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from hpc_oialr.errors import ConfigError, check_interval
from hpc_oialr.linalg.noise_spectra import noise_edge
from hpc_oialr.lowrank.execution import dense_cost, factored_cost

# Smallest k, and the multiple that r is rounded to. On an H200 in bf16 (768 x 768, k/4) an odd r takes 2 to 6 times as
# long as the next multiple of 16, and 64 fills the tiles; few shapes also mean few recompilations.
MULTIPLES = ((512, 64), (128, 16), (32, 8))


# Of layers whose tokens nobody has counted: so many that forming U S and S Vh costs nothing beside them.
MANY_TOKENS = 1 << 30


@dataclass(frozen=True)
class Spectrum:
    """A low-rank layer in an update, for rules that look at all of them.

    Attributes
    ----------
    s
        By which directions are compared, descending, on the CPU: the present r singular values of S, or with second
        moments those of ``L^T S R``, of which a square is what a direction adds to the output, or to the loss.
    m, n
        Shape of the weight.
    tokens
        Rows of the layer's input in a pass (of a convolution: positions of the output).
    bases_trained
        Whether ``U`` and ``Vh`` are trained throughout.
    """

    s: Tensor
    m: int
    n: int
    tokens: int = MANY_TOKENS
    bases_trained: bool = False


class RankRule(ABC):
    """Chooses r from singular values; one small type each."""

    joint: ClassVar[bool] = False  # whether layers share something: choose_all() must see all of them
    by_importance: ClassVar[bool] = (
        False  # whether it looks at what a cut preserves, not at the weights' singular values
    )

    @abstractmethod
    def choose(self, s: Tensor, m: int, n: int) -> int:
        """How many singular values to keep.

        Parameters
        ----------
        s
            Present singular values, descending, on the CPU; at most k = min(m, n).
        m, n
            Shape of the weight.
        """

    def choose_all(self, layers: Sequence[Spectrum], limits: RankLimits) -> list[int]:
        """:meth:`choose` for each layer of an update; ``limits`` are applied by the caller."""
        return [self.choose(layer.s, layer.m, layer.n) for layer in layers]

    def least(self, m: int, n: int) -> int:
        """The fewest that :meth:`choose` returns, whatever the values are."""
        return 1


@dataclass(frozen=True)
class RelativeCutoff(RankRule):
    """The paper's rule: keep ``s_i >= beta s_0``. Early in training it hardly cuts weights of large aspect ratio."""

    beta: float = 0.1

    def __post_init__(self) -> None:
        check_interval("rule.beta", self.beta, 0, 1, fix="The paper uses 0.1-0.2.")

    def choose(self, s: Tensor, m: int, n: int) -> int:
        """Values at or above the cutoff."""
        return int((s >= self.beta * s[0]).sum())


@dataclass(frozen=True)
class CumulativeSum(RankRule):
    """SARA's rule: smallest r whose values reach ``threshold`` of sum(s). arXiv 2408.03290."""

    threshold: float = 0.5

    def __post_init__(self) -> None:
        check_interval("rule.threshold", self.threshold, 0, 1, closed=(False, True))

    def choose(self, s: Tensor, m: int, n: int) -> int:
        """Leading values up to the threshold."""
        return _leading(s, self.threshold)


@dataclass(frozen=True)
class Energy(RankRule):
    """Smallest r whose squared values reach ``threshold`` of ``||W||_F^2``."""

    threshold: float = 0.9

    def __post_init__(self) -> None:
        check_interval("rule.threshold", self.threshold, 0, 1, closed=(False, True))

    def choose(self, s: Tensor, m: int, n: int) -> int:
        """Leading values up to the threshold."""
        return _leading(_relative(s).square(), self.threshold)


@dataclass(frozen=True)
class OutputEnergy(RankRule):
    """Smallest r whose directions carry ``threshold`` of what the layer puts out: a cut takes no more than the rest.

    By second moments, as ``importance`` says: with "inputs" of ``E ||W x||^2``, with "inputs and gradients" of the
    estimate of the loss. With "weights", and where no hook sees the inputs, it is :class:`Energy`.
    """

    threshold: float = 0.99
    by_importance = True

    def __post_init__(self) -> None:
        check_interval("rule.threshold", self.threshold, 0, 1, closed=(False, True))

    def choose(self, s: Tensor, m: int, n: int) -> int:
        """Leading values up to the threshold."""
        return _leading(_relative(s).square(), self.threshold)


@dataclass(frozen=True)
class NoiseEdge(RankRule):
    """Keep singular values above those of noise; independent of the aspect ratio.

    The noise level comes from the median of all k values. Once more than half are cut it is unknown, and nothing
    more is cut.
    """

    def choose(self, s: Tensor, m: int, n: int) -> int:
        """Values above ``sigma (sqrt m + sqrt n)``."""
        middle = (min(m, n) - 1) // 2
        if middle >= len(s):
            return len(s)
        return int((s > noise_edge(float(s[middle]), m, n)).sum())


@dataclass(frozen=True)
class StableRank(RankRule):
    """``r = ceil(factor ||S||_F^2 / s_0^2)``, as Cuttlefish. arXiv 2305.02538."""

    factor: float = 4.0

    def __post_init__(self) -> None:
        check_interval("rule.factor", self.factor, 0, math.inf)

    def choose(self, s: Tensor, m: int, n: int) -> int:
        """A multiple of the stable rank."""
        return math.ceil(self.factor * float(_relative(s).square().sum()))


@dataclass(frozen=True)
class FixedFraction(RankRule):
    """``r = fraction k`` for every layer, reached in steps of ``limits.max_drop``."""

    fraction: float = 0.25

    def __post_init__(self) -> None:
        check_interval("rule.fraction", self.fraction, 0, 1, closed=(False, True))

    def choose(self, s: Tensor, m: int, n: int) -> int:
        """The same share of k everywhere."""
        return self.least(m, n)

    def least(self, m: int, n: int) -> int:
        """What it always keeps."""
        return math.ceil(self.fraction * min(m, n))


@dataclass(frozen=True)
class Budget(RankRule):
    """All layers together take at most a share of what they take when dense; each update decides anew for all of them.

    Directions are dropped in the order of what they add to their layer, as a share of its energy, over what dropping
    them saves. As the saving grows with r and the energy falls with it, no other choice within the budget loses less in
    sum, but for the last multiple. Reached in steps of ``limits.max_drop``; layers at ``limits.min_fraction`` may keep a
    run above it.

    Parameters
    ----------
    operations
        Share of the multiply-adds of a training step, by :func:`~hpc_oialr.lowrank.execution.factored_cost` over
        ``dense_cost`` for the tokens that each layer has seen.
    parameters
        Share of the trained parameters, ``r^2`` a layer (with trained bases ``r (m + n + r)``) over ``m n``.
    """

    operations: float | None = None
    parameters: float | None = None
    joint = by_importance = True

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            rule = "must be set, or rule.parameters" if not given else "cannot be set beside rule.parameters"
            raise ConfigError("rule.operations", self.operations, rule, fix="E.g. 0.3")
        for name, value in given.items():
            check_interval(f"rule.{name}", value, 0, 1, closed=(False, True))

    def choose(self, s: Tensor, m: int, n: int) -> int:
        """For a single layer with a budget of its own."""
        return self.choose_all([Spectrum(s, m, n)], RankLimits(round_to=1, min_fraction=0.0))[0]

    def choose_all(self, layers: Sequence[Spectrum], limits: RankLimits) -> list[int]:
        """The r of all layers, multiples of what ``limits`` round to."""
        kept, saved, loss = [], [], []
        for layer in layers:
            steps = limits.path(len(layer.s), min(layer.m, layer.n))
            energy = np.append(0.0, _relative(layer.s).square().cumsum(0).numpy())
            cost = np.array([self._cost(layer, r) for r in steps])
            kept.append(steps)
            saved.append(cost[:-1] - cost[1:])
            # A direction goes only after those behind it.
            lost = (energy[steps[:-1]] - energy[steps[1:]]) / (energy[-1] or 1.0) / saved[-1]
            loss.append(np.maximum.accumulate(lost))
        dense = sum(self._dense(layer) for layer in layers)
        excess = sum(self._cost(layer, len(layer.s)) for layer in layers) - self._share * dense
        if excess <= 0:
            return [len(layer.s) for layer in layers]
        owners = np.repeat(np.arange(len(layers)), list(map(len, saved)))
        order = np.argsort(np.concatenate(loss), kind="stable")
        dropped = int(np.searchsorted(np.concatenate(saved)[order].cumsum(), excess)) + 1
        counts = np.bincount(owners[order[:dropped]], minlength=len(layers))
        return [steps[count] for steps, count in zip(kept, counts.tolist(), strict=True)]

    def even_share(self, shapes: Iterable[tuple[int, int]], *, bases_trained: bool) -> float:
        """The share of k that uses up the budget if all layers, of these shapes and many tokens, keep the same."""
        # a share^2 + b share = c
        shapes = list(shapes)
        squares, sides = sum(min(shape) ** 2 for shape in shapes), sum(min(shape) * sum(shape) for shape in shapes)
        a, b = (1, 0) if self.operations is None else (1, 2)
        if bases_trained:
            a, b = (1, 1) if self.operations is None else (3, 3)
        c = self._share * sum(map(math.prod, shapes)) * (1 if self.operations is None else 3)
        return min(1.0, (math.sqrt((b * sides) ** 2 + 4 * a * squares * c) - b * sides) / (2 * a * squares))

    @property
    def _share(self) -> float:
        return self.parameters if self.operations is None else self.operations  # type: ignore[return-value]

    def _dense(self, layer: Spectrum) -> int:
        return layer.m * layer.n if self.operations is None else dense_cost(layer.tokens, layer.m, layer.n)

    def _cost(self, layer: Spectrum, r: int) -> int:
        m, n = layer.m, layer.n
        if self.operations is None:
            return r * (r + (m + n) * layer.bases_trained)
        of_bases = layer.tokens * r * (m + n + 2 * r) if layer.bases_trained else 0
        return factored_cost(layer.tokens, m, n, r) + of_bases


def _relative(s: Tensor) -> Tensor:
    """Values divided by the largest, so that squares neither overflow nor underflow; all 0 for a zero matrix."""
    return s.double() / (float(s[0]) or 1.0)


def _leading(values: Tensor, threshold: float) -> int:
    total = values.double().cumsum(0)
    return int((total < threshold * total[-1]).sum()) + 1


@dataclass(frozen=True, kw_only=True)
class RankLimits:
    """Limits on the r that a rule chooses.

    Parameters
    ----------
    max_drop
        Largest share of r that one update may cut; where rounding up would leave r as it is, one multiple is cut.
    min_fraction
        r never goes under this share of k.
    round_to
        r is rounded up to a multiple of this; "auto": 64 for k >= 512, 16 for k >= 128, 8 for k >= 32, else 1.
        1 follows the rule to the last number, as the paper does.
    at_conversion
        Share of k kept at the conversion itself; 1 keeps all, as the paper does. At r = k the
        factors need more memory than the dense weight; from about 0.7 on they need less.
    """

    max_drop: float = 0.5
    min_fraction: float = 0.01
    round_to: int | Literal["auto"] = "auto"
    at_conversion: float = 1.0

    def __post_init__(self) -> None:
        check_interval("limits.max_drop", self.max_drop, 0, 1, closed=(False, True), fix="The published code uses 0.5.")
        check_interval("limits.min_fraction", self.min_fraction, 0, 1, closed=(True, True))
        check_interval("limits.at_conversion", self.at_conversion, 0, 1, closed=(False, True))
        if self.round_to != "auto" and not (isinstance(self.round_to, int) and self.round_to >= 1):
            raise ConfigError("limits.round_to", self.round_to, 'must be a positive whole number, or "auto"')

    def apply(self, wanted: int, r: int, k: int) -> int:
        """The new r: ``wanted`` within the limits, never above the present ``r``."""
        multiple = self.multiple(k)
        goal = min(r, _round_up(max(1, wanted, math.ceil(self.min_fraction * k)), multiple))
        least = _round_up(math.ceil(r * (1 - self.max_drop)), multiple)
        # If rounding up gave r itself, r would never shrink: cut at least one multiple.
        return max(goal, least if least < r else (r - 1) // multiple * multiple)

    def renewed(self, wanted: int, r: int, k: int, growth: float) -> tuple[int, int]:
        """How many of ``r`` directions stay at an update, and how many new ones join them: ``growth`` of r.

        New ones replace only what the rule drops. The new r is ``wanted``, within the limits, plus the new ones, rounded
        up to a multiple, but not above the present r, or r right after the conversion if that is larger. Places left are
        for the largest of the dropped values, then for more new directions. Where none fits: :meth:`apply`.
        """
        least = min(r, max(1, wanted, math.ceil(self.min_fraction * k), math.ceil(r * (1 - self.max_drop))))
        new = self._share(growth, r, k) if growth else 0
        total = min(max(r, self.initial(k)), _round_up(least + new, self.multiple(k)))
        stay = min(r, max(least, total - new))
        return (stay, total - stay) if new and stay < total else (self.apply(wanted, r, k), 0)

    def most_new(self, r: int, k: int, growth: float) -> int:
        """The most new directions that :meth:`renewed` may give: a share of r, or as many as fill it up to a multiple."""
        return max(self._share(growth, r, k), self.renewed(r, r, k, growth)[1]) if growth else 0

    @staticmethod
    def _share(growth: float, r: int, k: int) -> int:
        return min(max(1, round(growth * r)), k - r)  # outside of the present bases k - r fit

    def path(self, r: int, k: int) -> list[int]:
        """``r`` and every smaller one that a rule may choose, descending."""
        multiple = self.multiple(k)
        least = min(r, _round_up(max(1, math.ceil(self.min_fraction * k)), multiple))
        return [r, *range((r - 1) // multiple * multiple, least - 1, -multiple)]

    def initial(self, k: int) -> int:
        """r right after the conversion."""
        least = max(1, round(self.at_conversion * k), math.ceil(self.min_fraction * k))
        return min(k, _round_up(least, self.multiple(k)))

    def multiple(self, k: int) -> int:
        """The multiple that r is rounded to, for ``k = min(m, n)``."""
        if self.round_to != "auto":
            return self.round_to
        return next((multiple for least, multiple in MULTIPLES if k >= least), 1)


def _round_up(r: int, multiple: int) -> int:
    return -(-r // multiple) * multiple
