"""Memory, traffic and time of a recipe, for any number of nodes and any engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from hpc_oialr.engines import DDP, EngineConfig, SingleEngine
from hpc_oialr.method.oialr import OIALR
from hpc_oialr.method.rules import RankRule
from hpc_oialr.plan.deployment import (
    Deployment,
    all_engines,
    data_processes,
    incompatibility,
    is_sharded,
    label,
)
from hpc_oialr.plan.fake_tensors import fake_tensors
from hpc_oialr.plan.footprint import Footprint, footprint
from hpc_oialr.plan.schedule import LayerShape, Phase, phases, predictable_rule
from hpc_oialr.plan.step_traces import StepTraces
from hpc_oialr.plan.timing import Machine, step_time, svd_seconds
from hpc_oialr.plan.trace_event import sharded_event_bytes, trace_event
from hpc_oialr.plan.trace_step import Step, traced_session
from hpc_oialr.plan.traffic import event_messages, messages, total_bytes
from hpc_oialr.plan.workload import Workload
from hpc_oialr.processes import World

GIB = 1024**3

# Seconds of a step of one process alone: of the stage ("dense", "converted", "end"), its batch, its threads.
Measured = Callable[[str, int, int], float]


@dataclass(frozen=True)
class Stage:
    """A step of a phase that a plan looks at closely.

    Attributes
    ----------
    flops
        Of one process, the optimizer's included.
    sent
        Bytes of the whole tensors that a process's messages are about.
    compute_s, waiting_s
        Time of its operations, and of messages that they do not hide.
    """

    phase: Phase
    memory: Footprint
    flops: float
    sent: float
    compute_s: float
    waiting_s: float

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.compute_s + self.waiting_s


@dataclass(frozen=True)
class Event:
    """A conversion or an update: the most bytes of one process, bytes sent, time of SVDs and of messages."""

    peak: float
    sent: float
    svd_s: float
    waiting_s: float

    @property
    def seconds(self) -> float:
        """Of the event."""
        return self.svd_s + self.waiting_s


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A run under one deployment and engine.

    Attributes
    ----------
    incompatibility
        Why it cannot be, or None.
    global_batch, steps
        Of the run.
    stages
        "dense"; with the method also "converted", right after the conversion, and "end".
    events
        With the method "conversion", and "update", the first one.
    dense_s, oialr_s
        Time of all steps, dense and with the method; without evaluations, checkpoints and data loading.
    events_s
        Of ``oialr_s`` the conversion and all updates.
    """

    deployment: Deployment
    engine: EngineConfig
    incompatibility: str | None = None
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

    def fits(self, memory_gib: float) -> bool:
        """Whether it can be, and a process never needs more memory."""
        return self.incompatibility is None and self.peak <= memory_gib * GIB


class Planner:
    """Plans a workload on a machine.

    Parameters
    ----------
    r_fraction
        Share of k to which r falls under rules that depend on singular values.
    weak
        Keep the batch of a process, so that the global one grows; otherwise the global one is kept.
    measured
        Times of real steps, preferred to counted operations.
    """

    def __init__(
        self,
        workload: Workload,
        machine: Machine,
        *,
        r_fraction: float = 0.25,
        weak: bool = False,
        measured: Measured | None = None,
    ) -> None:
        self.workload, self.machine, self.weak, self.measured = workload, machine, weak, measured
        method = workload.config.oialr
        self.rule: RankRule | None = None
        self.assumption: str | None = None
        if method:
            self.rule, self.assumption = predictable_rule(method.rule, r_fraction)
        self._traces = StepTraces(workload)
        self._event_peaks: dict[tuple[int, bool, str], float] = {}

    @property
    def basis(self) -> str:
        """What the time of a step is scaled from: "measured steps", "measured speeds" or "stated speeds"."""
        return "measured steps" if self.measured else f"{self.machine.speeds.partition(':')[0]} speeds"

    # -- the method's part -----------------------------------------------------------------------

    @cached_property
    def shapes(self) -> dict[str, LayerShape]:
        """Layers that become low-rank, in order; none without the method."""
        with fake_tensors():
            controller = traced_session(self.workload, SingleEngine(World()), batch=1, r={}).controller
            sites = controller.sites if isinstance(controller, OIALR) else []
            return {site.name: LayerShape(site.name, *site.shape) for site in sites}

    def phases(self, steps: int) -> list[Phase]:
        """Of a run of so many steps."""
        return phases(self.workload.config.oialr, list(self.shapes.values()), steps, self.rule)

    @cached_property
    def _stages(self) -> dict[str, Phase]:
        every = self.phases(self.workload.total_steps)
        names = {"dense": 0, "converted": 1, "end": -1} if len(every) > 1 else {"dense": 0}
        return {name: every[index] for name, index in names.items()}

    @cached_property
    def first_events(self) -> dict[str, Phase]:
        """The phases that begin with the conversion and with the first update, by event."""
        every = self.phases(self.workload.total_steps)
        return {phase.event: phase for phase in reversed(every[1:3])}

    # -- deployments -----------------------------------------------------------------------------

    def deployment(self, nodes: int, per_node: int, engine: EngineConfig) -> Deployment:
        """So many processes, each with its share of the batch."""
        batch = self.workload.config.train.global_batch
        groups = data_processes(engine, per_node if self.weak else nodes * per_node)
        return Deployment(nodes, per_node, max(1, batch // max(1, groups)))

    def forecast(self, nodes: Sequence[int], per_node: int, engine: EngineConfig) -> list[Forecast]:
        """One for each number of nodes."""
        config, reasons, batches = (
            self.workload.config,
            dict[Deployment, str | None](),
            dict[Deployment, int](),
        )
        deployments = [self.deployment(count, per_node, engine) for count in nodes]
        for d in deployments:
            batches[d] = (
                d.batch * data_processes(engine, d.processes) if self.weak else config.train.global_batch
            )
            reasons[d] = incompatibility(
                engine,
                d.processes,
                global_batch=batches[d],
                accumulation=config.train.accumulation,
                optimizer=type(config.optimizer).__name__,
            )
        possible = [d for d in deployments if reasons[d] is None]
        steps = {name: self._traces.steps(engine, possible, phase.r) for name, phase in self._stages.items()}
        return [
            Forecast(deployment=d, engine=engine, incompatibility=reasons[d], global_batch=batches[d])
            if reasons[d]
            else self._forecast(d, engine, batches[d], {name: found[d] for name, found in steps.items()})
            for d in deployments
        ]

    def advice(self, forecast: Forecast, nodes: Sequence[int], memory_gib: float) -> str:
        """For a run that does not fit: engines that do, on as many or on how many more nodes, or what to try."""
        per_node, here = forecast.deployment.per_node, forecast.deployment.nodes
        others = [engine for engine in all_engines(per_node) if label(engine) != label(forecast.engine)]
        for count in (here, *(n for n in sorted(nodes) if n > here)):
            tried = [self.forecast([count], per_node, engine)[0] for engine in others]
            good = [f"{label(f.engine)} ({f.peak / GIB:.2f} GiB)" for f in tried if f.fits(memory_gib)]
            if good:
                where = "" if count == here else f" on {count} nodes"
                return f"fits with {', '.join(good)}{where}"
        if not self.workload.config.train.activation_checkpointing:
            return (
                "no engine fits; try --train.activation_checkpointing true, or a smaller --train.global_batch"
            )
        return "no engine fits; try a smaller --train.global_batch or a larger --train.accumulation"

    # -- one forecast ----------------------------------------------------------------------------

    def _forecast(
        self, d: Deployment, engine: EngineConfig, global_batch: int, steps: Mapping[str, Step]
    ) -> Forecast:
        stages = {name: self._stage(name, step, d, engine) for name, step in steps.items()}
        before = {"conversion": "dense", "update": "converted"}
        events = {}
        for name, phase in self.first_events.items():
            peak = self._event_peak(phase, steps[before[name]], d, engine)
            events[name] = self._event(phase, d, engine, peak)
        total = self.workload.with_train(global_batch=global_batch).total_steps
        run = self.phases(total)
        events_s = sum(self._event(phase, d, engine, 0.0).seconds for phase in run[1:])
        return Forecast(
            deployment=d,
            engine=engine,
            global_batch=global_batch,
            steps=total,
            stages=stages,
            events=events,
            dense_s=total * stages["dense"].seconds,
            oialr_s=sum(phase.steps * self._step_s(phase, stages) for phase in run) + events_s,
            events_s=events_s,
        )

    def _stage(self, name: str, step: Step, d: Deployment, engine: EngineConfig) -> Stage:
        sent = messages(step, engine, d.processes)
        threads = self.machine.threads(d.per_node)
        measured_s = self.measured(name, d.batch, threads) if self.measured else None
        times = step_time(step, sent, engine, d, self.machine, measured_s)
        memory = footprint(step, engine, d.processes)
        return Stage(self._stages[name], memory, step.flops, total_bytes(sent), *times)

    def _event(self, phase: Phase, d: Deployment, engine: EngineConfig, peak: float) -> Event:
        sharded = is_sharded(engine, d.processes)
        sent = event_messages(phase, self.shapes, d.processes)
        svd_s = svd_seconds(phase, self.shapes, d, self.machine, sharded=sharded)
        return Event(peak, total_bytes(sent), svd_s, self.machine.messages_s(sent, d))

    def _event_peak(self, phase: Phase, before: Step, d: Deployment, engine: EngineConfig) -> float:
        """From what one process alone holds during the event, by what the engine holds between steps."""
        memory = footprint(before, engine, d.processes)
        resident = memory.resident
        if memory.gradients and isinstance(engine, DDP):
            # New buckets are made before the old ones are freed.
            resident += memory.gradients
            for name, r in phase.before.items():
                shape = self.shapes[name]
                trained = shape.m * shape.n if phase.event == "conversion" else r * r
                resident -= 4.0 * (trained - phase.r[name] ** 2)
        if is_sharded(engine, d.processes):
            return resident + sharded_event_bytes(self.shapes, phase, d.processes)
        # More processes than layers have no more results alive at once.
        at_once, several = min(d.processes, len(phase.before)), d.processes > 1
        key = (at_once, several, phase.event)
        if key not in self._event_peaks:
            self._event_peaks[key] = trace_event(self.workload, phase, processes=at_once, held=several)
        return self._event_peaks[key] + resident - footprint(before, engine, 1).resident

    def _step_s(self, phase: Phase, stages: Mapping[str, Stage]) -> float:
        """Of a step of any phase: between "converted" and "end", by the operations of the low-rank layers."""
        if not phase.r:
            return stages["dense"].seconds
        first, last = stages["converted"], stages["end"]
        here, high, low = (self._low_rank_cost(p.r) for p in (phase, first.phase, last.phase))
        share = (here - low) / (high - low) if high > low else 0.0
        return last.seconds + share * (first.seconds - last.seconds)

    def _low_rank_cost(self, r: Mapping[str, int]) -> int:
        """Multiply-adds of all factored layers per token, forward and backward."""
        shapes = ((self.shapes[name], value) for name, value in r.items())
        return sum(2 * value * (shape.m + shape.n) + 3 * value * value for shape, value in shapes)
