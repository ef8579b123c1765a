"""r of every layer over a run, known before it starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch

from hpc_oialr.method.config import OIALRConfig
from hpc_oialr.method.rules import Budget, FixedFraction, RankRule

_NO_VALUES = torch.empty(0)


@dataclass(frozen=True)
class Phase:
    """The steps between two events of the method."""

    start: int  # steps done before it
    steps: int  # its length
    # What it begins with; "bases" are trained from now on, or frozen.
    event: Literal["start", "conversion", "update", "bases"]
    before: Mapping[str, int]  # r before the event of each layer it works on; k at the conversion
    r: Mapping[str, int]  # of each low-rank layer from now on; empty while the model is dense
    trained: bool = False  # whether U and Vh of these layers are trained
    grows: bool = False  # whether directions join them at the event


def predictable_rule(
    rule: RankRule, r_fraction: float, shapes: Iterable[tuple[int, int]] = (), *, bases_trained: bool = False
) -> tuple[RankRule, str | None]:
    """The rule to plan with, and what was assumed: most rules need singular values, which a plan cannot know.

    Of a budget the layers, of these ``shapes``, are taken to get the same share of k.
    """
    if isinstance(rule, FixedFraction):
        return rule, None
    if isinstance(rule, Budget) and (shapes := list(shapes)):
        share = rule.even_share(shapes, bases_trained=bases_trained)
        assumed = (
            f"{rule} divides by singular values, which are not known before the run: each layer keeps {share:.3g} k"
        )
        return FixedFraction(share), assumed
    return (
        FixedFraction(r_fraction),
        f"{rule} depends on singular values, which are not known before the run: r falls to {r_fraction:g} k, within "
        "the recipe's limits (--r-fraction)",
    )


def phases(
    config: OIALRConfig | None,
    shapes: Mapping[str, tuple[int, int]],
    total: int,
    rule: RankRule | None = None,
) -> list[Phase]:
    """Every phase of a run of ``total`` steps; one dense phase without the method.

    ``shapes`` (m, n) by layer, in the model's order. ``rule``, instead of the recipe's, must not depend on singular
    values.
    """
    if config is None:
        return [Phase(0, total, "start", {}, {})]
    # Steps done at the conversion, then at every update.
    config = config.in_steps(total)
    delay, frequency = int(config.delay), int(config.frequency)
    conversion = max(1, delay)
    updates = range(delay + frequency, total + 1, frequency)
    times = [conversion, *(t for t in updates if t > conversion)] if conversion <= total else []
    ends = [*times, total]
    found = [Phase(0, ends[0], "start", {}, {})]
    rule, limits, r = rule or config.rule, config.limits, dict[str, int]()
    for number, (start, end) in enumerate(zip(times, ends[1:], strict=True)):
        # The conversion takes all layers, updates a growing share of them, from the last one.
        share = min(1.0, config.layer_share_step * number)
        due = list(shapes)[len(shapes) - max(1, round(share * len(shapes))) :] if number else list(shapes)
        before = {name: r.get(name, min(shapes[name])) for name in due}
        growth = 0.0 if config.trains_bases(start - 1) else config.grow
        for name in due:
            shape, k = shapes[name], min(shapes[name])
            wanted = rule.choose(_NO_VALUES, *shape)
            r = {**r, name: sum(limits.renewed(wanted, r[name], k, growth)) if number else limits.initial(k)}
        event: Literal["update", "conversion"] = "update" if number else "conversion"
        phase = Phase(start, end - start, event, before, r, grows=number > 0 and growth > 0)
        found += _split(phase, config)
    return found


def _split(phase: Phase, config: OIALRConfig) -> list[Phase]:
    """At the steps in which bases begin or cease to be trained."""
    end = phase.start + phase.steps
    changes = {int(t) for pair in config.free_phases for t in pair if t is not None and phase.start < t < end}
    parts = []
    for start, stop in pairwise([phase.start, *sorted(changes), end]):
        part = phase if start == phase.start else Phase(start, 0, "bases", {}, phase.r)
        parts.append(replace(part, steps=stop - start, trained=config.trains_bases(start)))
    return parts
