"""r of every layer over a run, known before it starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from hpc_oialr.method.config import OIALRConfig
from hpc_oialr.method.rules import FixedFraction, RankRule

_NO_VALUES = torch.empty(0)


@dataclass(frozen=True)
class LayerShape:
    """A layer that becomes low-rank, and its weight's shape (m, n)."""

    name: str
    m: int
    n: int

    @property
    def k(self) -> int:
        """min(m, n)."""
        return min(self.m, self.n)


@dataclass(frozen=True)
class Phase:
    """The steps between two events of the method.

    Attributes
    ----------
    start, steps
        Steps done before it, and its length.
    event
        What it begins with.
    before
        r of each layer that the event works on, before it; k at the conversion.
    r
        r of each low-rank layer from now on; empty while the model is dense.
    """

    start: int
    steps: int
    event: Literal["start", "conversion", "update"]
    before: Mapping[str, int]
    r: Mapping[str, int]


def predictable_rule(rule: RankRule, r_fraction: float) -> tuple[RankRule, str | None]:
    """The rule to plan with, and what was assumed: most rules depend on singular values, which a plan cannot know."""
    if isinstance(rule, FixedFraction):
        return rule, None
    return (
        FixedFraction(r_fraction),
        f"{rule} depends on singular values, which are not known before the run: r falls to {r_fraction:g} k, within "
        "the recipe's limits (--r-fraction)",
    )


def phases(
    config: OIALRConfig | None, shapes: Sequence[LayerShape], total: int, rule: RankRule | None = None
) -> list[Phase]:
    """Every phase of a run of ``total`` steps; one dense phase without the method.

    Parameters
    ----------
    shapes
        The layers that become low-rank, in the model's order.
    rule
        Instead of the recipe's; must not depend on singular values.
    """
    if config is None:
        return [Phase(0, total, "start", {}, {})]
    times = list(_event_times(config, total))
    ends = [*times, total]
    found = [Phase(0, ends[0], "start", {}, {})]
    rule, limits, r = rule or config.rule, config.limits, dict[str, int]()
    for number, (start, end) in enumerate(zip(times, ends[1:], strict=True)):
        # The conversion takes all layers, updates a growing share of them, from the last one.
        share = min(1.0, config.layer_share_step * number)
        due = shapes[len(shapes) - max(1, round(share * len(shapes))) :] if number else shapes
        before = {shape.name: r.get(shape.name, shape.k) for shape in due}
        for name, m, n, k in ((s.name, s.m, s.n, s.k) for s in due):
            new = limits.apply(rule.choose(_NO_VALUES, m, n), r[name], k) if number else limits.initial(k)
            r = {**r, name: new}
        found.append(Phase(start, end - start, "update" if number else "conversion", before, r))
    return found


def _event_times(config: OIALRConfig, total: int) -> Iterator[int]:
    """Steps done at the conversion, then at every update."""
    conversion = max(1, config.delay)
    if conversion <= total:
        yield conversion
    for t in range(config.delay + config.frequency, total + 1, config.frequency):
        if t > conversion:
            yield t
