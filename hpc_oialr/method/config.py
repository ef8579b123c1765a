"""The settings of the method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from hpc_oialr.errors import ConfigError, UnknownNameError, check_interval
from hpc_oialr.lowrank import Selection
from hpc_oialr.lowrank.execution import measured_crossover
from hpc_oialr.method.rules import RankLimits, RankRule, RelativeCutoff

IMPORTANCES = ("weights", "inputs", "inputs and gradients")
MOMENTS = ("full", "diagonal")
CONVS = ("flattened", "tucker")


def is_share(time: float) -> bool:
    """Whether a time is a share of the run, not a number of steps."""
    return 0 < time < 1


@dataclass(kw_only=True)
class OIALRConfig:
    """Settings of :class:`hpc_oialr.OIALR`; :meth:`paper` gives those of the published method.

    Times are whole numbers of steps or, as numbers between 0 and 1, shares of the whole run, which :meth:`in_steps` turns
    into steps; ``oialr train`` and ``oialr plan`` do so by themselves.

    Parameters
    ----------
    delay
        d: full-rank steps before the conversion (steps, or share of the run).
    frequency
        nu: steps between two updates (steps, or share of the run).
    rule
        Chooses r from the singular values.
    limits
        Limits on what ``rule`` chooses.
    selection
        Which layers become low-rank.
    layer_share_step
        Updates start at the last layers and reach this share more of the layers each time; 1 = all at once.
    stability_frequency
        Measure every layer's stability every so many full-rank steps (or share of the run); None = not.
    stability_threshold
        Convert each layer on its own, once its stability has stayed at or above this for
        ``stability_patience`` measurements in a row, not before ``delay``; None = all at ``delay``.
    stability_patience
        See ``stability_threshold`` (measurements).
    core_lr_scale
        The step of a core over the step its optimizer would give it; "auto" chooses by optimizer.
    carry_moments
        Transform the optimizer's moments at every change of basis; False zeroes them, as published.
    importance
        What a cut, at the conversion or later, preserves: "weights" keeps the largest singular values of the weight, as
        published; "inputs" changes the layers' outputs least; "inputs and gradients" also counts by how much the loss
        depends on each output; "auto" is "inputs" where the engine's layers see them whole, else "weights". The rule
        chooses r by the weights' singular values in every case. Layers whose inputs no hook sees are cut by weights; the
        log says so once.
    moments
        Of dense layers: "full" second moments (n^2 numbers a layer, for up to 4,096 features), or the "diagonal".
    moments_steps
        The steps before a change over which second moments are gathered; before an update no more than a twentieth of
        ``frequency``, but one, and none for layers whose r can't fall.
    factor_dtype
        Storage of the frozen ``U`` and ``Vh``; None = the weight's dtype.
    conv
        Form of low-rank convolutions: "flattened" to a matrix, out x (in x kernel), as published; "tucker": bases for the
        output and the input channels only, and the core, which keeps the kernel's extent, is trained. The rule chooses
        r for both. Kernels of extent one are matrices in either. Tucker layers are cut by their weights (``importance``
        "auto" or "weights"), on one process or under ``DistributedDataParallel``.
    train
        "cores" trains S, with U and Vh frozen between updates (the paper); "factors" trains all three, at the cost of
        ``r (m + n)`` further gradients and moments a layer, and of ``B r (m + n)`` multiply-adds.
    bases_trained
        Phases (first step, end) in which U and Vh are trained too although ``train`` is "cores", counted in steps from
        0, or as shares of the run; the end is not part of it, None = to the end of the run.
    grow
        Directions that join ``U`` and ``Vh`` at each update, with zeros in S, as a share of r: those of the weight's
        gradient that the bases lack; 0 for none, as published. What the rule keeps of S stays, and r is that plus the new
        ones; at the next update the rule judges them as all others. An eighth is much. Not while bases are trained.
    grow_steps
        The steps before an update whose gradients count; at most a tenth of ``frequency``, but one.
    orthogonality_bound
        Bases further from orthonormal than this (Frobenius norm of ``Q^T Q - I`` over sqrt(r)) are
        re-orthogonalised by QR, with R folded into S; "auto": by the dtype they are stored in, 1e-4 for fp32 and
        fp64, 8e-3 for bf16, 1e-3 for fp16.
    crossover
        Ratio of factored to merged multiply-adds up to which a layer runs factored: 1 by the count, or
        the result file of ``python -m benchmarks.layer`` for what was measured on this machine, in the dtype in
        which a layer runs.
    """

    delay: int | float = 1000
    frequency: int | float = 100
    rule: RankRule = field(default_factory=RelativeCutoff)
    limits: RankLimits = field(default_factory=RankLimits)
    selection: Selection = field(default_factory=Selection)
    layer_share_step: float = 0.1
    stability_frequency: int | float | None = None
    stability_threshold: float | None = None
    stability_patience: int = 2
    core_lr_scale: float | Literal["auto"] = "auto"
    carry_moments: bool = True
    importance: Literal["auto", "weights", "inputs", "inputs and gradients"] = "auto"
    moments: Literal["full", "diagonal"] = "full"
    moments_steps: int = 8
    factor_dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None
    conv: Literal["flattened", "tucker"] = "flattened"
    train: Literal["cores", "factors"] = "cores"
    bases_trained: list[tuple[int | float, int | float | None]] = field(default_factory=list)
    grow: float = 0.0
    grow_steps: int = 8
    orthogonality_bound: float | Literal["auto"] = "auto"
    crossover: float | str = 1.0

    def __post_init__(self) -> None:
        for name, least in (("stability_patience", 1), ("moments_steps", 1), ("grow_steps", 1)):
            if getattr(self, name) < least:
                raise ConfigError(name, getattr(self, name), f"must be a whole number of at least {least}")
        for name, least in (("delay", 0), ("frequency", 1), ("stability_frequency", 1)):
            time = getattr(self, name)
            if time is not None and not is_share(time) and (isinstance(time, float) or time < least):
                rule = f"must be a whole number of at least {least} (steps), or lie between 0 and 1 (share of the run)"
                raise ConfigError(name, time, rule)
        for name, choices in (("importance", ("auto", *IMPORTANCES)), ("moments", MOMENTS), ("conv", CONVS)):
            if getattr(self, name) not in choices:
                raise UnknownNameError(name, getattr(self, name), choices)
        check_interval("layer_share_step", self.layer_share_step, 0, 1, closed=(False, True))
        if self.rule.joint and self.layer_share_step < 1:
            rule = f"must be 1 with {type(self.rule).__name__}, which looks at all layers in each update"
            raise ConfigError("layer_share_step", self.layer_share_step, rule)
        if self.rule.joint and self.grow:
            rule = f"adds directions beyond what {type(self.rule).__name__} allows all layers together"
            raise ConfigError("grow", self.grow, rule, fix="Set it to 0.")
        if not isinstance(self.orthogonality_bound, str):
            check_interval("orthogonality_bound", self.orthogonality_bound, 0, 1)
        every, threshold = self.stability_frequency, self.stability_threshold
        if threshold is not None:
            check_interval("stability_threshold", threshold, 0, 1)
            if every is None:
                fix = "Set stability_frequency, e.g. to a fifth of delay."
                raise ConfigError("stability_threshold", threshold, "needs measurements", fix=fix)
        if not isinstance(self.core_lr_scale, str) and self.core_lr_scale <= 0:
            raise ConfigError("core_lr_scale", self.core_lr_scale, 'must be positive, or "auto"')
        self._check_phases()
        self._check_growth()
        self._check_tucker()
        if isinstance(self.crossover, str):
            measured_crossover(self.crossover)
        else:
            check_interval("crossover", self.crossover, 0, 2, closed=(True, True))

    def in_steps(self, total: int) -> OIALRConfig:
        """The same settings for a run of ``total`` steps, with shares of the run turned into the nearest steps."""

        def steps(time: float, least: int = 0) -> int:
            return max(least, round(time * total)) if is_share(time) else int(time)

        every = self.stability_frequency
        phases = [(steps(start), None if stop is None else steps(stop)) for start, stop in self.bases_trained]
        return replace(
            self,
            delay=steps(self.delay),
            frequency=steps(self.frequency, least=1),
            stability_frequency=None if every is None else steps(every, least=1),
            # In a short run a phase may round to nothing.
            bases_trained=[(start, stop) for start, stop in phases if start != stop],
        )

    def require_steps(self) -> None:
        """ConfigError if a time is a share of a run whose length nobody has said."""
        times = [
            ("delay", self.delay),
            ("frequency", self.frequency),
            ("stability_frequency", self.stability_frequency),
        ]
        times += [("bases_trained", time) for phase in self.bases_trained for time in phase]
        for name, time in times:
            if time is not None and is_share(time):
                rule = "is a share of the run, and nothing says how long that is"
                raise ConfigError(name, time, rule, fix="Pass OIALRConfig(...).in_steps(total_steps).")

    def _check_phases(self) -> None:
        end = 0.0
        shares = {is_share(time) for phase in self.bases_trained for time in phase if time}
        # Steps and shares compare only once the length of the run is known.
        for start, stop in self.bases_trained if len(shares) < 2 else ():
            if start < end or (stop is not None and stop <= start):
                rule = "must be pairs of times (first, end), in order, without overlap; only the last end may be null"
                raise ConfigError("bases_trained", self.bases_trained, rule)
            end = math.inf if stop is None else stop
        if self.bases_trained and self.train == "factors":
            fix = 'Set train to "cores", or leave out bases_trained.'
            raise ConfigError("bases_trained", self.bases_trained, 'U and Vh always train with "factors"', fix=fix)
        if self.frees_bases and self.factor_dtype in ("bfloat16", "float16"):
            rule = "is for frozen bases: steps of trained ones would be lost in rounding"
            raise ConfigError("factor_dtype", self.factor_dtype, rule, fix="Set it to null.")

    def _check_growth(self) -> None:
        check_interval("grow", self.grow, 0, 0.5, closed=(True, True))
        if self.grow and self.train == "factors":
            fix = 'Set grow to 0, or train to "cores"; bases may be trained in some phases.'
            raise ConfigError("grow", self.grow, 'needs frozen bases, and with train="factors" none are', fix=fix)
        if self.grow >= self.limits.max_drop:
            rule = f"must be below limits.max_drop, here {self.limits.max_drop:g}, or r could not fall"
            raise ConfigError("grow", self.grow, rule)

    def _check_tucker(self) -> None:
        if self.conv != "tucker":
            return
        fix = 'Set conv to "flattened", or '
        if self.rule.by_importance:
            rule = f"has two r a layer, which {type(self.rule).__name__} cannot choose"
            raise ConfigError("conv", self.conv, rule, fix=fix + "choose another rule, e.g. Energy.")
        if self.frees_bases or self.grow:
            rule = "needs bases that are frozen and do not grow"
            raise ConfigError("conv", self.conv, rule, fix=fix + "leave out train, bases_trained and grow.")
        if self.importance not in ("auto", "weights"):
            rule = f"cuts convolutions by their weights, not by {self.importance}"
            raise ConfigError("conv", self.conv, rule, fix=fix + 'importance to "auto".')

    @property
    def free_phases(self) -> list[tuple[int | float, int | float | None]]:
        """The phases, as ``bases_trained``, in which ``U`` and ``Vh`` are trained."""
        return [(0, None)] if self.train == "factors" else self.bases_trained

    @property
    def frees_bases(self) -> bool:
        """Whether ``U`` and ``Vh`` are ever trained."""
        return bool(self.free_phases)

    def trains_bases(self, t: int) -> bool:
        """Whether ``U`` and ``Vh`` of low-rank layers are trained in step ``t``, counted from 0."""
        return any(start <= t and (stop is None or t < stop) for start, stop in self.free_phases)

    @classmethod
    def paper(cls, **settings: Any) -> OIALRConfig:
        """The published method (arXiv 2401.08505), with some ``settings`` of its own.

        All directions are kept at the conversion, the largest singular values at updates, r follows the cutoff to the
        last number, moments are zeroed at a cut, and a core's step is the optimizer's own.
        """
        published: dict[str, Any] = {
            "limits": RankLimits(round_to=1),
            "importance": "weights",
            "carry_moments": False,
            "core_lr_scale": 1.0,
        }
        return cls(**published | settings)

    def importance_under(self, engine: str, known: Sequence[str]) -> str:
        """``importance`` under an engine whose layers see enough for the ``known`` ones; ConfigError if not for it."""
        if self.importance == "auto":
            return "inputs" if "inputs" in known else "weights"
        if self.importance not in known:
            rule = f"under {engine} must be {' or '.join(map(repr, known))}, as a layer does not see the others whole"
            raise ConfigError("importance", self.importance, rule, fix='Set it to "auto".')
        return self.importance

    def next_conversion(self, t: int) -> float:
        """The first step after ``t`` that may convert dense layers which the user has not frozen; infinite if none."""
        first = max(1, self.delay)
        if t < first:
            return first
        every = self.stability_frequency if self.stability_threshold is not None else None
        return math.inf if every is None else (t // every + 1) * every

    def next_update(self, t: int) -> int:
        """The first step after ``t`` that updates low-rank layers."""
        return int(self.delay + (max(0, t - self.delay) // self.frequency + 1) * self.frequency)

    @property
    def moments_steps_of_updates(self) -> int:
        """Steps before an update over which second moments are gathered.

        They take up to a third of a step: at most 1.7 % of all where ``frequency`` is 20 or more.
        """
        return max(1, min(self.moments_steps, int(self.frequency) // 20))

    @property
    def steps_of_growth(self) -> int:
        """Steps before an update over which gradients are sketched; 0 if bases do not grow.

        Each takes up to an eighth of a layer's operations more, where ``grow`` is an eighth of r and r + 1/8 r a multiple
        of ``limits.round_to``: 1 % of all steps by default.
        """
        return max(1, min(self.grow_steps, int(self.frequency) // 10)) if self.grow else 0

    def may_fall(self, m: int, n: int, r: int, growth: float = 0.0) -> bool:
        """Whether an update may drop directions of an m x n layer of this ``r``, whatever its singular values are."""
        return self.limits.renewed(self.rule.least(m, n), r, min(m, n), growth)[0] < r

    def bound_on_errors(self, stored: torch.dtype) -> float:
        """``orthogonality_bound`` of bases in this dtype."""
        if not isinstance(self.orthogonality_bound, str):
            return self.orthogonality_bound
        # Rounding alone takes bases of bf16 to 1.6e-3 at every update, which a repair in fp32 cannot change.
        return max(1e-4, torch.finfo(stored).eps)
