"""Memory, traffic and time of a recipe, for any number of nodes and any engine, as rows of plain numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from hpc_oialr.distributed import World
from hpc_oialr.engines import DDP, EngineConfig, Single, SingleEngine, TensorParallel
from hpc_oialr.errors import ConfigError
from hpc_oialr.method.oialr import OIALR
from hpc_oialr.method.rules import RankRule
from hpc_oialr.plan import step_cost
from hpc_oialr.plan.fake_world import fake_tensors
from hpc_oialr.plan.machine import GIB, Machine
from hpc_oialr.plan.schedule import Phase, phases, predictable_rule
from hpc_oialr.plan.scripted_run import Measured, ScriptedRun
from hpc_oialr.plan.trace_step import Step, trace_event, trace_step, traced_context
from hpc_oialr.plan.workload import Deployment, Workload, all_engines, label

MB = 1e6
# The phase before each event, among those that are reported.
BEFORE = {"conversion": "dense", "update": "converted"}


class Planner:
    """Plans a workload on a machine.

    ``memory_gib`` of a process. ``r_fraction``: share of k to which r falls under rules that depend on singular
    values. ``weak`` keeps the batch of a process, so that the global one grows; otherwise the global one is kept.
    """

    def __init__(
        self,
        workload: Workload,
        machine: Machine,
        memory_gib: float,
        *,
        r_fraction: float = 0.25,
        weak: bool = False,
    ) -> None:
        self.workload, self.machine, self.memory_gib, self.weak = workload, machine, memory_gib, weak
        self.measured: Measured | None = None
        self.rule: RankRule | None = None
        self.assumption: str | None = None
        if (method := workload.config.oialr) is not None:
            if method.conv == "tucker":
                rule = "trains cores of two r, of which no formula here counts memory and operations"
                fix = "Plan with flattened, which trains fewer numbers by more operations, or measure a short run."
                raise ConfigError("oialr.conv", method.conv, rule, fix=fix)
            shapes = self.shapes.values() if method.rule.joint else ()
            trained = method.train == "factors"
            self.rule, self.assumption = predictable_rule(method.rule, r_fraction, shapes, bases_trained=trained)
        self._traces: dict[tuple[object, ...], Step] = {}
        self._event_peaks: dict[tuple[int, bool, str, bool], float] = {}

    def use(self, measured: Measured) -> None:
        """Prefer measured steps to counted operations, and take SVDs to be as fast as a measured conversion."""
        self.measured = measured
        if measured.conversion_s:
            conversion, alone = self.first_events["conversion"], Deployment(Single(), 1, 1)
            moments = self.moments(conversion, alone)
            expected_s = step_cost.svd_seconds(conversion, self.shapes, alone, self.machine, moments)
            speed = self.machine.svd_flops * expected_s / measured.conversion_s
            self.machine = replace(self.machine, svd_flops=speed)

    def grounds(self) -> list[str]:
        """One line for everything that is counted, measured, stated or assumed."""
        measured = "measured: steps and conversion of one process on this machine"
        return [
            "counted: memory, operations and messages, by the run's own code on tensors without data; by formula: "
            "DDP's buckets, DeepSpeed, and SVDs of sharded matrices",
            self.machine.speeds,
            self.machine.links,
            measured if self.measured else f"assumed: {self.machine.assumed}",
            *(f"assumed: {text}" for text in (self.workload.assumption, self.assumption) if text),
            *self._note_on_moments(),
            "left out: evaluations, checkpoints, data loading, stragglers, new bases of an event, time to gather for it",
        ]

    def _note_on_moments(self) -> Iterator[str]:
        conversion = self.first_events.get("conversion")
        numbers = 0 if conversion is None else sum(self.moments(conversion, Deployment(Single(), 1, 1)).values())
        if numbers:
            where = "in the host's memory" if not self.machine.cores else "in the peak of the conversion"
            size = f"{4.0 * numbers / GIB:.2g} GiB"
            yield f"counted: {size} of second moments before the conversion, {where} of each process"

    @cached_property
    def _layers(self) -> dict[str, tuple[tuple[int, int], int]]:
        """Shape (m, n) of each layer that becomes low-rank, and numbers of second moments that its conversion needs."""
        with fake_tensors():
            context = traced_context(self.workload, SingleEngine(World()), batch=1, r={})
            controller = context.controller
            if not isinstance(controller, OIALR):
                return {}
            ScriptedRun(context).expect("conversion")
            sums = {key: tensor.numel() for key, tensor in controller.tensor_state().items()}
            return {t.name: (t.shape, sums.get(f"{t.name}.moments.0", 0)) for t in controller.targets}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes (m, n) of the layers that become low-rank, in order; none without the method."""
        return {name: shape for name, (shape, _) in self._layers.items()}

    def moments(self, phase: Phase, d: Deployment) -> dict[str, int]:
        """Numbers of second moments, on each process, of the layers that an event cuts by them."""
        method = self.workload.config.oialr
        if method is None or (importance := d.importance(method)) == "weights":
            return {}
        if phase.event == "conversion":
            return {name: numbers for name, (_, numbers) in self._layers.items() if numbers}
        both = 1 + (importance == "inputs and gradients")
        growth = method.grow if phase.grows else 0.0
        falls = {name: method.may_fall(*self.shapes[name], r, growth) for name, r in phase.before.items()}
        return {name: both * r * r for name, r in phase.before.items() if falls[name]}

    def phases(self, steps: int) -> list[Phase]:
        """All phases of a run of ``steps``."""
        return phases(self.workload.config.oialr, self.shapes, steps, self.rule)

    @cached_property
    def stages(self) -> dict[str, Phase]:
        """The phases that are reported: "dense"; after the conversion also "converted" and "end".

        "factors": the first in which bases are trained, if they are frozen in another; "growing": the last steps before
        the first update at which bases grow, with its r.
        """
        every = self.phases(self.workload.total_steps)
        found = {"dense": every[0]} | ({"converted": every[1], "end": every[-1]} if len(every) > 1 else {})
        trained = [phase for phase in every if phase.trained]
        found |= {"factors": trained[0]} if 0 < len(trained) < len(every) - 1 else {}
        growing = [before for before, phase in pairwise(every) if self._sketched(phase)]
        return found | ({"growing": growing[0]} if growing else {})

    def _sketched(self, phase: Phase) -> dict[str, int]:
        """Columns of the sketches of gradients that the event of a phase begins with, by layer."""
        method = self.workload.config.oialr
        if method is None or not phase.grows:
            return {}
        limits, shapes = method.limits, self.shapes
        most = {name: limits.most_new(r, min(shapes[name]), method.grow) for name, r in phase.before.items()}
        return {name: q for name, q in most.items() if q}

    @cached_property
    def first_events(self) -> dict[str, Phase]:
        """The phases that begin with the conversion and with the first update, by event."""
        events = [p for p in self.phases(self.workload.total_steps)[1:] if p.event != "bases"]
        return {phase.event: phase for phase in reversed(events[:2])}

    def deployment(self, nodes: int, per_node: int, engine: EngineConfig) -> Deployment:
        """Processes on ``nodes`` nodes, each with its share of the batch."""
        batch = self.workload.config.train.global_batch
        groups = Deployment(engine, 1 if self.weak else nodes, per_node).groups
        return Deployment(engine, nodes, per_node, max(1, batch // max(1, groups)))

    def rows(
        self, nodes: Sequence[int], per_node: int, engine: EngineConfig, *, advise: bool = True
    ) -> list[dict[str, Any]]:
        """One for each number of nodes; units end the names, what does not exist is left out.

        ``STAGE_...`` are figures of a step of one process (``STAGE_sent_mb``: the whole tensors its messages carry),
        ``EVENT_...`` those of the conversion and of the first update; ``dense_s`` and ``oialr_s`` the time of all
        steps, ``events_s`` the SVDs and factors of all events in it.
        """
        train, optimizer = self.workload.config.train, type(self.workload.config.optimizer).__name__
        rows: list[dict[str, Any]] = []
        for count in nodes:
            d = self.deployment(count, per_node, engine)
            batch = d.batch * d.groups if self.weak else train.global_batch
            row: dict[str, Any] = {"engine": label(engine), "nodes": count, "processes": d.processes}
            row |= {"batch": d.batch, "global_batch": batch}
            reason = d.incompatibility(batch, accumulation=train.accumulation, optimizer=optimizer)
            method = self.workload.config.oialr
            if method is not None and method.frees_bases and not isinstance(engine, (Single, DDP)):
                reason = "trains no bases (oialr.train, oialr.bases_trained); DDP does"
            if method is not None and method.grow and isinstance(engine, TensorParallel) and d.processes > 1:
                reason = "its layers see parts of inputs and gradients (oialr.grow)"
            try:
                if method is not None:
                    d.importance(method)
            except ConfigError as error:
                reason = str(error)
            if reason is None:
                row |= self._figures(d, batch)
                row["fits"] = row["peak_gib"] <= self.memory_gib
                row["advice"] = self.advice(d, nodes) if advise and not row["fits"] else ""
            else:
                row |= {"fits": False, "advice": reason}
            rows.append(row)
        return rows

    def _step(self, d: Deployment, phase: Phase, *, growing: bool = False) -> Step:
        """A traced step; deployments that are traced alike share one, since a trace takes some seconds."""
        engine, processes = ("", 1) if d.bare else (repr(d.engine), d.processes)
        key = (engine, processes, d.batch, phase.trained, growing, *phase.r.values())
        if key not in self._traces:
            self._traces[key] = trace_step(self.workload, d, phase.r, trained=phase.trained, growing=growing)
        return self._traces[key]

    def advice(self, d: Deployment, nodes: Sequence[int]) -> str:
        """For a run that does not fit: engines that do, on as many or on how many more nodes, or what to try."""
        others = [other for other in all_engines(d.per_node) if label(other) != label(d.engine)]
        for count in (d.nodes, *(n for n in sorted(nodes) if n > d.nodes)):
            tried = [self.rows([count], d.per_node, other, advise=False)[0] for other in others]
            good = [f"{row['engine']} ({row['peak_gib']:.2f} GiB)" for row in tried if row["fits"]]
            if good:
                where = "" if count == d.nodes else f" on {count} nodes"
                return f"fits with {', '.join(good)}{where}"
        if self.workload.config.train.activation_checkpointing:
            return "no engine fits; try a smaller --train.global_batch or a larger --train.accumulation"
        return "no engine fits; try --train.activation_checkpointing true, or a smaller --train.global_batch"

    def _figures(self, d: Deployment, global_batch: int) -> dict[str, Any]:
        total = self.workload.with_train(global_batch=global_batch).total_steps
        steps = {name: self._step(d, phase, growing=name == "growing") for name, phase in self.stages.items()}
        figures: dict[str, Any] = {"steps": total}
        for name, step in steps.items():
            memory, sent = step_cost.footprint(step, d), step_cost.messages(step, d)
            measured_s = self.measured.steps.get((name, d.batch)) if self.measured else None
            compute_s, waiting_s = step_cost.step_time(step, sent, d, self.machine, measured_s)
            of_step = {
                "parameters_gib": memory.parameters / GIB,
                "gradients_gib": memory.gradients / GIB,
                "optimizer_gib": memory.state / GIB,
                "activations_gib": memory.activations / GIB,
                "peak_gib": memory.peak / GIB,
                "gflop": (step.passes.flops.total() + step.update.flops.total()) / 1e9,
                "sent_mb": sum(m.size for m in sent) / MB,
                "compute_s": compute_s,
                "waiting_s": waiting_s,
                "step_s": compute_s + waiting_s,
            }
            figures |= {f"{name}_{key}": value for key, value in of_step.items()}
        for name, phase in self.first_events.items():
            svd_s, waiting_s, sent_bytes = self._event(phase, d)
            figures |= {
                f"{name}_peak_gib": self._event_peak(phase, steps[BEFORE[name]], d) / GIB,
                f"{name}_moments_gib": 4.0 * sum(self.moments(phase, d).values()) / GIB,
                f"{name}_s": svd_s + waiting_s,
                f"{name}_svd_s": svd_s,
                f"{name}_sent_mb": sent_bytes / MB,
            }
        run = self.phases(total)
        events_s = sum(sum(self._event(phase, d)[:2]) for phase in run[1:])
        basis = "measured steps" if self.measured else f"{self.machine.speeds.partition(':')[0]} speeds"
        return {
            **figures,
            "peak_gib": max(value for key, value in figures.items() if key.endswith("_peak_gib")),
            "time_from": basis,
            "dense_s": total * figures["dense_step_s"],
            "oialr_s": sum(phase.steps * self._step_s(phase, figures) for phase in run) + events_s,
            "events_s": events_s,
        }

    def _event(self, phase: Phase, d: Deployment) -> tuple[float, float, float]:
        """Seconds of SVDs and of messages, and bytes sent."""
        moments, growth = self.moments(phase, d), self._sketched(phase)
        sent = step_cost.event_messages(
            phase, self.shapes, d.processes, moments, whole_bases=d.whole_bases, growth=growth
        )
        svd_s = step_cost.svd_seconds(phase, self.shapes, d, self.machine, moments)
        return svd_s, self.machine.messages_s(sent, d.per_node), sum(m.size for m in sent)

    def _event_peak(self, phase: Phase, before: Step, d: Deployment) -> float:
        """Traced on one process, corrected by the difference of what is resident under the engine.

        On a CPU not less than the step before it, which gathers second moments.
        """
        memory = step_cost.footprint(before, d)
        moments = self.moments(phase, d)
        on_gpu = not self.machine.cores and phase.event == "conversion"
        # Of dense layers a GPU has those of one at a time.
        held = 4.0 * (max if on_gpu else sum)(moments.values()) if moments else 0.0
        resident = memory.resident
        if memory.gradients and isinstance(d.engine, DDP):
            # New buckets are made before the old ones are freed.
            resident += memory.gradients
            for name, r in phase.before.items():
                m, n = self.shapes[name]
                bases = m + n if phase.trained else 0
                trained = m * n if phase.event == "conversion" else r * (r + bases)
                resident -= 4.0 * (trained - phase.r[name] * (phase.r[name] + bases))
        gathering = memory.peak + held if moments and not on_gpu else 0.0
        if d.sharded:
            beside = step_cost.sharded_event_bytes(self.shapes, phase, d.processes, whole_bases=d.whole_bases)
            return max(gathering, resident + held + beside)
        # At most one result of each layer is alive at once.
        key = min(d.processes, len(phase.before)), d.processes > 1, phase.event, on_gpu
        if key not in self._event_peaks:
            trained = self.stages[BEFORE[phase.event]].trained
            self._event_peaks[key] = trace_event(
                self.workload, phase, self.rule, processes=key[0], held=key[1], trained=trained, on_gpu=on_gpu
            )
        alone = step_cost.footprint(before, Deployment(d.engine, 1, 1))
        return max(gathering, self._event_peaks[key] + resident - alone.resident)

    def _step_s(self, phase: Phase, figures: Mapping[str, float]) -> float:
        """Time of a step of any phase: interpolated by operations between reported ones with bases trained or not."""
        if not phase.r:
            return figures["dense_step_s"]
        stages = [name for name in ("converted", "end", "factors") if name in self.stages]
        alike = [name for name in stages if self.stages[name].trained == phase.trained] or stages
        begin, end = alike[0], alike[-1]
        first, last = figures[f"{begin}_step_s"], figures[f"{end}_step_s"]
        # Multiply-adds per token, forward and backward.
        here, high, low = (
            sum(2 * r * sum(self.shapes[name]) + 3 * r * r for name, r in p.r.items())
            for p in (phase, self.stages[begin], self.stages[end])
        )
        return last + (first - last) * ((here - low) / (high - low) if high > low else 0.0)
