"""Memory, messages and time of a recipe, for every number of nodes and every engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from hpc_oialr.engines import DDP, FSDP, EngineConfig, SingleEngine, TensorParallel
from hpc_oialr.method.oialr import OIALR
from hpc_oialr.plan.events import of_split_event, rehearse_event
from hpc_oialr.plan.footprint import footprint
from hpc_oialr.plan.forecast import Event, Forecast, Speeds, Stage
from hpc_oialr.plan.imagined import imagined_session
from hpc_oialr.plan.interpolation import Rehearsals
from hpc_oialr.plan.places import Place, data_processes, misfit
from hpc_oialr.plan.rehearsal import Step
from hpc_oialr.plan.sequence import Phase, Shape, foreseeable, phases
from hpc_oialr.plan.subject import Subject
from hpc_oialr.plan.timing import Machine, event_time, step_time
from hpc_oialr.plan.valueless import valueless_tensors
from hpc_oialr.processes import World

# Seconds of a step of one process alone: of the stage ("dense", "converted", "end"), its batch, its threads.
Measured = Callable[[str, int, int], float]


@dataclass(frozen=True)
class Assumptions:
    """How a plan is made.

    Attributes
    ----------
    r_fraction
        Share of k to which r falls under rules that look at singular values.
    weak
        Keep the batch of a process, so that the global one grows; otherwise the global one is kept.
    measured
        Times of real steps, if there was a probe.
    """

    r_fraction: float = 0.25
    weak: bool = False
    measured: Measured | None = None


class Planner:
    """Plans a subject on a machine."""

    def __init__(self, subject: Subject, machine: Machine, assumptions: Assumptions | None = None) -> None:
        self.subject, self.machine, self.how = subject, machine, assumptions or Assumptions()
        self._rehearsals = Rehearsals(subject)
        self._peaks: dict[tuple[int, bool, str], float] = {}

    # -- the method's part -----------------------------------------------------------------------

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Layers that take part, in order; none without the method."""
        with valueless_tensors():
            controller = imagined_session(self.subject, SingleEngine(World()), 1).controller
            sites = controller.sites if isinstance(controller, OIALR) else []
            return {site.name: Shape.of(site) for site in sites}

    def phases(self, steps: int) -> list[Phase]:
        """Of a run of so many steps."""
        config = self.subject.config.oialr
        rule = foreseeable(config.rule, self.how.r_fraction)[0] if config else None
        return phases(config, list(self.shapes.values()), steps, rule)

    @cached_property
    def _looks(self) -> dict[str, Phase]:
        """The phases that are looked at closely, and the first update."""
        every = self.phases(self.subject.total_steps)
        names = {"dense": 0, "converted": 1, "end": -1} if len(every) > 1 else {"dense": 0}
        return {name: every[index] for name, index in names.items()}

    @cached_property
    def first_events(self) -> dict[str, Phase]:
        """The phases that begin with the conversion and with the first update, by event."""
        every = self.phases(self.subject.total_steps)
        return {phase.event: phase for phase in reversed(every[1:3])}

    # -- places ----------------------------------------------------------------------------------

    def place(self, nodes: int, per_node: int, engine: EngineConfig) -> Place:
        """Where so many processes are, each with its share of the batch."""
        batch = self.subject.config.train.global_batch
        dealt = data_processes(engine, per_node if self.how.weak else nodes * per_node)
        return Place(nodes, per_node, max(1, batch // max(1, dealt)))

    def global_batch(self, place: Place, engine: EngineConfig) -> int:
        """Samples of a step of all processes."""
        if not self.how.weak:
            return self.subject.config.train.global_batch
        return place.batch * data_processes(engine, place.processes)

    def _misfit(self, place: Place, engine: EngineConfig) -> str | None:
        config = self.subject.config
        return misfit(
            engine,
            place.processes,
            global_batch=self.global_batch(place, engine),
            accumulation=config.train.accumulation,
            optimizer=type(config.optimizer).__name__,
        )

    # -- forecasts -------------------------------------------------------------------------------

    def forecast(self, nodes: Sequence[int], per_node: int, engine: EngineConfig) -> list[Forecast]:
        """One for each number of nodes."""
        places = [self.place(count, per_node, engine) for count in nodes]
        reasons = {place: self._misfit(place, engine) for place in places}
        possible = [place for place in places if reasons[place] is None]
        steps = {
            name: self._rehearsals.steps(engine, possible, phase.r) for name, phase in self._looks.items()
        }
        return [
            self._of_place(place, engine, {name: found[place] for name, found in steps.items()})
            if place in possible
            else Forecast(
                place=place,
                engine=engine,
                misfit=reasons[place],
                global_batch=self.global_batch(place, engine),
            )
            for place in places
        ]

    def _of_place(self, place: Place, engine: EngineConfig, steps: Mapping[str, Step]) -> Forecast:
        stages = {name: self._stage(name, steps[name], place, engine) for name in steps}
        bases = {"conversion": "dense", "update": "converted"}
        events = {
            name: self._event(phase, steps[bases[name]], place, engine)
            for name, phase in self.first_events.items()
        }
        batch = self.global_batch(place, engine)
        total = self.subject.with_batch(batch).total_steps
        run, speeds, split = self.phases(total), Speeds(stages, self.shapes), _is_split(engine, place)
        events_s = sum(
            event_time(phase, self.shapes, place, self.machine, split=split).total_s for phase in run[1:]
        )
        return Forecast(
            place=place,
            engine=engine,
            global_batch=batch,
            steps=total,
            stages=stages,
            events=events,
            dense_s=total * stages["dense"].time.total_s,
            oialr_s=sum(phase.steps * speeds.seconds(phase) for phase in run) + events_s,
            events_s=events_s,
        )

    def _stage(self, name: str, step: Step, place: Place, engine: EngineConfig) -> Stage:
        threads = self.machine.device.threads(place.per_node)
        measured_s = self.how.measured(name, place.batch, threads) if self.how.measured else None
        return Stage(
            self._looks[name],
            footprint(step, engine, place.processes),
            step_time(step, engine, place, self.machine, measured_s),
            step.forward_backward.work.total_flops + step.update.work.total_flops,
        )

    def _event(self, phase: Phase, before: Step, place: Place, engine: EngineConfig) -> Event:
        split, processes = _is_split(engine, place), place.processes
        time = event_time(phase, self.shapes, place, self.machine, split=split)
        held = footprint(before, engine, processes)
        resident = held.resident
        if held.gradients and isinstance(engine, DDP):
            # New buckets are made before the old ones are let go.
            resident += self._trained_after(phase, held.gradients)
        if split:
            return Event(time, resident + of_split_event(self.shapes, phase, processes))
        # More processes than layers have no more results alive at once.
        at_once = min(processes, len(phase.before))
        key = (at_once, processes > 1, phase.event)
        if key not in self._peaks:
            self._peaks[key] = rehearse_event(self.subject, phase, processes=at_once, held=processes > 1)
        return Event(time, self._peaks[key] + resident - footprint(before, engine, 1).resident)

    def _trained_after(self, phase: Phase, before: float) -> float:
        """Bytes of what is trained after an event."""
        numbers = {name: r * r for name, r in phase.before.items()}
        if phase.event == "conversion":
            numbers = {name: self.shapes[name].m * self.shapes[name].n for name in phase.before}
        saved = sum(count - phase.r[name] ** 2 for name, count in numbers.items())
        return before - 4.0 * saved


def _is_split(engine: EngineConfig, place: Place) -> bool:
    return isinstance(engine, (FSDP, TensorParallel)) and place.processes > 1
