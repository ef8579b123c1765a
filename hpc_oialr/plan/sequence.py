"""How r of every layer falls over a run, known before it begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from hpc_oialr.lowrank import Site
from hpc_oialr.method.config import OIALRConfig
from hpc_oialr.method.rules import FixedFraction, RankRule

_NO_VALUES = torch.empty(0)


@dataclass(frozen=True)
class Shape:
    """A layer that takes part, and its weight's shape."""

    name: str
    m: int
    n: int

    @classmethod
    def of(cls, site: Site) -> Shape:
        """The shape of a site."""
        return cls(site.name, *site.shape)

    @property
    def k(self) -> int:
        """min(m, n)."""
        return min(self.m, self.n)


@dataclass(frozen=True)
class Phase:
    """The steps between two events of the method.

    Attributes
    ----------
    start
        Steps done when it begins.
    steps
        How long it lasts.
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


def foreseeable(rule: RankRule, r_fraction: float) -> tuple[RankRule, str | None]:
    """The rule to plan with, and what had to be assumed: most rules look at singular values nobody knows yet."""
    if isinstance(rule, FixedFraction):
        return rule, None
    return (
        FixedFraction(r_fraction),
        f"{rule} looks at singular values, which nobody knows beforehand: r falls to {r_fraction:g} k, within the "
        "recipe's limits (--r-fraction)",
    )


def phases(
    config: OIALRConfig | None, shapes: Sequence[Shape], total: int, rule: RankRule | None = None
) -> list[Phase]:
    """Every phase of a run of ``total`` steps; one dense phase without the method.

    Parameters
    ----------
    shapes
        The layers that take part, in the model's order.
    rule
        In place of the recipe's; must not look at singular values.
    """
    if config is None:
        return [Phase(0, total, "start", {}, {})]
    times = list(_event_times(config, total))
    ends = [*times, total]
    found = [Phase(0, ends[0], "start", {}, {})]
    r: dict[str, int] = {}
    for number, (start, end) in enumerate(zip(times, ends[1:], strict=True)):
        worked_on = shapes if number == 0 else _due(config, shapes, number)
        before = {shape.name: r.get(shape.name, shape.k) for shape in worked_on}
        r = r | {shape.name: _new_r(config, rule or config.rule, shape, r) for shape in worked_on}
        event: Literal["conversion", "update"] = "update" if number else "conversion"
        found.append(Phase(start, end - start, event, before, r))
    return found


def _event_times(config: OIALRConfig, total: int) -> Iterator[int]:
    """Steps done at the conversion, then at every update."""
    conversion = max(1, config.delay)
    if conversion <= total:
        yield conversion
    for t in range(config.delay + config.frequency, total + 1, config.frequency):
        if t > conversion:
            yield t


def _due(config: OIALRConfig, shapes: Sequence[Shape], number: int) -> Sequence[Shape]:
    """The last layers first, a growing share of them, as the method does it."""
    share = min(1.0, config.layer_share_step * number)
    return shapes[len(shapes) - max(1, round(share * len(shapes))) :]


def _new_r(config: OIALRConfig, rule: RankRule, shape: Shape, r: Mapping[str, int]) -> int:
    if shape.name not in r:
        return config.limits.initial(shape.k)
    return config.limits.apply(rule.choose(_NO_VALUES, shape.m, shape.n), r[shape.name], shape.k)
