"""A run in one place, as it is foreseen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hpc_oialr.engines import EngineConfig
from hpc_oialr.plan.footprint import Footprint
from hpc_oialr.plan.places import Place
from hpc_oialr.plan.sequence import Phase, Shape
from hpc_oialr.plan.timing import EventTime, StepTime


@dataclass(frozen=True)
class Stage:
    """A phase that a plan looks at closely.

    Attributes
    ----------
    flops
        Of a step of one process, the optimizer's included.
    """

    phase: Phase
    memory: Footprint
    time: StepTime
    flops: float


@dataclass(frozen=True)
class Event:
    """A conversion or an update; ``peak`` is the most bytes that one process holds meanwhile."""

    time: EventTime
    peak: float


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A run in one place.

    Attributes
    ----------
    place, engine
        How many processes, and how they share the work.
    misfit
        Why it cannot be, or None.
    global_batch, steps
        Of the run.
    stages
        "dense"; with the method also "converted", right after the conversion, and "end".
    events
        With the method "conversion", and "update", the first one.
    dense_s, oialr_s
        Time to the end of all steps, dense and with the method; evaluations, checkpoints and data loading come on
        top.
    events_s
        Of ``oialr_s`` the conversion and all updates.
    """

    place: Place
    engine: EngineConfig
    misfit: str | None = None
    global_batch: int
    steps: int = 0
    stages: Mapping[str, Stage] = field(default_factory=dict)
    events: Mapping[str, Event] = field(default_factory=dict)
    dense_s: float = 0.0
    oialr_s: float = 0.0
    events_s: float = 0.0

    @property
    def peak(self) -> float:
        """Most bytes of one process in the whole run."""
        steps = [stage.memory.peak for stage in self.stages.values()]
        return max([*steps, *(event.peak for event in self.events.values())])


class Speeds:
    """Time of a step in any phase: between those looked at, by the operations of the low-rank layers.

    Parameters
    ----------
    stages
        As in :class:`Forecast`.
    shapes
        Of the layers, by name.
    """

    def __init__(self, stages: Mapping[str, Stage], shapes: Mapping[str, Shape]) -> None:
        self.stages, self.shapes = stages, shapes

    def seconds(self, phase: Phase) -> float:
        """Of a step of this phase."""
        if not phase.r:
            return self.stages["dense"].time.total_s
        first, last = self.stages["converted"], self.stages["end"]
        high, low = self._cost(first.phase), self._cost(last.phase)
        share = (self._cost(phase) - low) / (high - low) if high > low else 0.0
        return last.time.total_s + share * (first.time.total_s - last.time.total_s)

    def _cost(self, phase: Phase) -> float:
        """Multiply-adds of all factored layers for a token, forward and backward."""
        shapes = self.shapes
        return float(
            sum(2 * r * (shapes[name].m + shapes[name].n) + 3 * r * r for name, r in phase.r.items())
        )
