"""What is trained: one flat, checked description of a run, and the usual ones by name."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from hpc_oialr import (
    Budget,
    CumulativeSum,
    Energy,
    FixedFraction,
    NoiseEdge,
    OIALRConfig,
    RankLimits,
    RankRule,
    RelativeCutoff,
    Selection,
    StableRank,
)
from hpc_oialr.errors import ConfigError, UnknownNameError, check_interval

RULES: dict[str, type[RankRule]] = {
    rule.__name__: rule
    for rule in (RelativeCutoff, CumulativeSum, Energy, NoiseEdge, StableRank, FixedFraction, Budget)
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Settings of one training; those from ``delay`` on are of low-rank runs alone.

    Parameters
    ----------
    name
        What rows call it.
    low_rank
        OIALR, or dense to the end.
    optimizer
        "muon": Muon for matrices and cores, AdamW for the rest. "adamw-muon": AdamW until the conversion, Muon for
        cores. "adamw": torch's AdamW for all.
    lr, core_lr, rest_lr
        Of dense matrices, of cores (default: the package's), and of the rest; under "adamw" ``lr`` is for all.
    weight_decay, warmup, label_smoothing, clip
        ``warmup`` is a share of the run, before a cosine to zero; ``clip`` bounds the gradient's norm.
    epochs, batch
        Default: the size's.
    delay, until
        Shares of the run: the conversion, and the last cut.
    cuts
        Updates from ``delay`` to ``until``; they go on at that pace to the end.
    at_conversion, fraction
        Shares of k: r right after the conversion, and the end of the straight line down to ``until``.
    rule
        "NAME" or "NAME:VALUE" of a rule of the package instead of that line, e.g. "RelativeCutoff:0.15" or "Budget:0.3".
    max_drop, min_fraction, round_to
        Limits of r; ``round_to`` default: 64 at widths of 512 and more, else 8.
    carry
        Carry the optimizer's moments through changes of basis.
    core_lr_scale
        Of a core's step under an optimizer without rates for cores; None = chosen by the optimizer.
    free_from, free_until
        Shares of the run between which U and Vh are trained too; None = never, and to the end.
    bases_lr
        Of U and Vh then; None = ``lr``.
    grow, grow_steps
        New directions at each update, as a share of r, and the steps whose gradients give them, at most a tenth of those
        between two updates.
    importance, moments
        By what conversion and cuts choose directions.
    layer_share
        Updates reach this share more of the layers each time.
    keep_first
        Leave the patch embedding dense.
    """

    name: str
    low_rank: bool = False
    optimizer: Literal["muon", "adamw-muon", "adamw"] = "muon"
    lr: float = 0.005
    core_lr: float | None = None
    rest_lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    label_smoothing: float = 0.1
    clip: float | None = None
    epochs: float | None = None
    batch: int | None = None
    delay: float = 0.1
    until: float = 0.4
    cuts: int = 8
    at_conversion: float = 0.5
    fraction: float = 0.25
    rule: str | None = None
    max_drop: float = 0.5
    min_fraction: float = 0.01
    round_to: int | None = None
    carry: bool = True
    core_lr_scale: float | None = None
    free_from: float | None = None
    free_until: float | None = None
    bases_lr: float | None = None
    grow: float = 0.0
    grow_steps: int = 8
    importance: Literal["weights", "inputs", "inputs and gradients"] = "weights"
    moments: Literal["full", "diagonal"] = "full"
    layer_share: float = 1.0
    keep_first: bool = False

    def __post_init__(self) -> None:
        if self.optimizer not in ("muon", "adamw-muon", "adamw"):
            raise UnknownNameError("optimizer", self.optimizer, ("muon", "adamw-muon", "adamw"))
        for name in ("lr", "rest_lr"):
            check_interval(name, getattr(self, name), 0, 10)
        check_interval("warmup", self.warmup, 0, 1, closed=(True, False))
        check_interval("delay", self.delay, 0, 1, closed=(True, False))
        if not self.delay < self.until <= 1:
            raise ConfigError("until", self.until, f"must lie in ({self.delay:g}, 1], after delay")
        if self.cuts < 1:
            raise ConfigError("cuts", self.cuts, "must be at least 1")
        if self.fraction > self.at_conversion:
            raise ConfigError("fraction", self.fraction, f"must be at most at_conversion = {self.at_conversion:g}")
        for name in ("at_conversion", "fraction"):
            check_interval(name, getattr(self, name), 0, 1, closed=(False, True))
        make_rule(self)

    def settings(self) -> dict[str, Any]:
        """All that is not a default, for a row."""
        defaults = {field.name: field.default for field in fields(self)}
        return {key: value for key, value in asdict(self).items() if value != defaults[key]}

    def oialr(self, steps: int, dim: int) -> tuple[OIALRConfig, RankRule]:
        """The method's settings for a run of ``steps`` steps, and its rule."""
        rule = make_rule(self)
        until = None if self.free_until is None else round(self.free_until * steps)
        phases = [] if self.free_from is None else [(round(self.free_from * steps), until)]
        config = OIALRConfig(
            bases_trained=phases,
            grow=self.grow,
            grow_steps=self.grow_steps,
            importance=self.importance,
            moments=self.moments,
            delay=max(1, round(self.delay * steps)),
            frequency=max(1, round((self.until - self.delay) * steps / self.cuts)),
            rule=rule,
            limits=RankLimits(
                max_drop=self.max_drop,
                min_fraction=self.min_fraction,
                round_to=self.round_to or (64 if dim >= 512 else 8),
                at_conversion=self.at_conversion,
            ),
            selection=Selection(keep_first=self.keep_first),
            layer_share_step=self.layer_share,
            core_lr_scale="auto" if self.core_lr_scale is None else self.core_lr_scale,
            carry_moments=self.carry,
        )
        return config, rule


class Line(RankRule):
    """The same r for all layers, down a straight line in the training's progress.

    The loop sets ``progress``, the share of the steps from the conversion to ``until``.
    """

    def __init__(self, start: float, end: float) -> None:
        self.start, self.end, self.progress = start, end, 0.0

    def choose(self, s: Any, m: int, n: int) -> int:
        """The present share of k."""
        share = self.start + (self.end - self.start) * min(1.0, self.progress)
        return max(1, round(share * min(m, n)))


def make_rule(variant: Variant) -> RankRule:
    """The rule a variant names."""
    if variant.rule is None:
        return Line(variant.at_conversion, variant.fraction)
    name, _, value = variant.rule.partition(":")
    if name not in RULES:
        raise UnknownNameError("rule", name, RULES)
    try:
        return RULES[name](*([float(value)] if value else []))
    except TypeError as error:
        raise ConfigError("rule", variant.rule, "gives a value to a rule that takes none") from error


def standard_variants() -> list[Variant]:
    """Dense with both optimizers, OIALR early, late and at twice the r, and OIALR as published."""
    cores = Variant(name="OIALR k/4", low_rank=True, core_lr=0.01)
    return [
        Variant(name="dense Muon"),
        cores,
        replace(cores, name="OIALR k/4, later", delay=0.3, until=0.5),
        replace(cores, name="OIALR k/2", fraction=0.5),
        Variant(name="dense AdamW", optimizer="adamw", lr=5e-4),
        Variant(
            name="OIALR published", low_rank=True, optimizer="adamw", lr=5e-4, weight_decay=0.01, clip=5.0,
            rule="RelativeCutoff:0.15", delay=1 / 6, until=1.0, cuts=25, at_conversion=1.0, round_to=1,
            carry=False, core_lr_scale=1.0, layer_share=0.1,
        ),
    ]  # fmt: skip


def parse(words: Sequence[str]) -> list[Variant]:
    """Variants from the command line.

    Each word is the name of a standard variant; or ``NAME:key=value,key=value``, where ``base=STANDARD`` gives what
    is not named; or a JSON file of a list of such settings.

    Raises
    ------
    UnknownNameError, ConfigError
        For names, keys or values that do not exist.
    """
    standard = {variant.name: variant for variant in standard_variants()}
    found: list[Variant] = []
    for word in words:
        if word in standard:
            found.append(standard[word])
        elif word.endswith(".json"):
            found += [_made(dict(item), word) for item in json.loads(Path(word).read_text())]
        elif ":" in word and "=" in word:
            name, _, pairs = word.partition(":")
            items = (pair.partition("=") for pair in pairs.split(","))
            found.append(_made({"name": name} | {key.strip(): text for key, _, text in items}, word))
        else:
            raise UnknownNameError("variant", word, standard)
    return found


def _made(settings: dict[str, Any], origin: str) -> Variant:
    standard = {variant.name: variant for variant in standard_variants()}
    base = settings.pop("base", None)
    if base is not None and base not in standard:
        raise UnknownNameError("base", base, standard, origin=origin)
    if "name" not in settings:
        raise ConfigError("name", None, "must be given for every variant", origin=origin)
    known = typing.get_type_hints(Variant)
    for key in settings:
        if key not in known:
            raise UnknownNameError("setting", key, known, origin=origin)
    values = {key: _value(key, text, known[key], origin) for key, text in settings.items()}
    return Variant(**values) if base is None else replace(standard[base], **values)


def _value(key: str, value: Any, kind: Any, origin: str) -> Any:
    """A value of the setting's own type; texts are those of the command line."""
    choices = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if isinstance(value, str) and str not in choices and typing.get_origin(kind) is not Literal:
        words = {"None": None, "null": None, "True": True, "true": True, "False": False, "false": False}
        try:
            value = words[value] if value in words else int(value) if int in choices else float(value)
        except ValueError as error:
            raise ConfigError(key, value, "must be a number, or true, false, null", origin=origin) from error
    if value is None and type(None) in choices:
        return value
    if float in choices and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    plain = tuple(choice for choice in choices if isinstance(choice, type))
    if plain and (not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain)):
        raise ConfigError(key, value, f"must be {' or '.join(p.__name__ for p in plain)}", origin=origin)
    return value
