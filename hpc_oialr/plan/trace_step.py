"""A training step, or an event of the method, by the run's own code on tensors without data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import torch

from hpc_oialr.engines import FSDPEngine, SingleEngine, TensorEngine
from hpc_oialr.lowrank.layout import local
from hpc_oialr.method.engine import Engine
from hpc_oialr.method.rules import RankRule
from hpc_oialr.plan.fake_world import fake_collectives, fake_tensors, fake_world
from hpc_oialr.plan.schedule import Phase
from hpc_oialr.plan.scripted_run import ScriptedRun, trained_parameters
from hpc_oialr.plan.tracer import Trace, Tracer
from hpc_oialr.plan.workload import Deployment, Workload
from hpc_oialr.record.memory import resident_tensors
from hpc_oialr.train.run_context import RunContext
from hpc_oialr.train.trainer import AUTOCAST, forward_backward


@dataclass(frozen=True)
class Resident:
    """Bytes that live between steps on one process."""

    trained: float  # parameters with gradients
    frozen: float  # parameters without: the bases
    buffers: float  # of the model
    state: float  # of the optimizer
    largest: float  # trained parameter


@dataclass(frozen=True)
class Step:
    """One step of one process: forward and backward pass, then the optimizer's update."""

    resident: Resident
    passes: Trace
    update: Trace
    half: bool = False  # whether the precision is "bf16" or "fp16"

    @property
    def flops(self) -> float:
        """Of all dtypes."""
        return float(sum(self.passes.flops.values()) + sum(self.update.flops.values()))


def trace_step(workload: Workload, d: Deployment, r: Mapping[str, int]) -> Step:
    """One step of rank 0, whose shards are the largest; ``r`` of every low-rank layer, empty if all are dense."""
    with fake_world(0, 1 if d.bare else d.processes) as world:
        built = d.engine.build(world, workload.config.train.precision)
        with fake_tensors():
            context = traced_context(workload, built, batch=d.batch, r=r)
            context.module.train()
            # FSDP2 sets its parameters' gradients itself, later: they are not told apart from other memory.
            fsdp, trained = isinstance(context.engine, FSDPEngine), trained_parameters(context)
            forward = Tracer(resident_tensors(context.module, context.optimizer), resizing=fsdp)
            noted = [] if fsdp else trained
            handles = [p.register_post_accumulate_grad_hook(forward.note_gradient) for p in noted]
            with forward:
                # Made here, so that it counts: on a GPU it is copied there in each step.
                samples = workload.batch(d.batch)
                forward_backward(context, samples, 0)
            for handle in handles:
                handle.remove()
            # The optimizer makes its state in its first update; the second one is like all others.
            _update(context)
            update = Tracer(resident_tensors(context.module, context.optimizer), resizing=fsdp)
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
                update.note_gradient(parameter)
            with update:
                _update(context)
            half = workload.config.train.precision in AUTOCAST
            return Step(_resident(context), forward.trace, update.trace, half)


def traced_context(
    workload: Workload, engine: Engine, *, batch: int, r: Mapping[str, int], rule: RankRule | None = None
) -> RunContext:
    """A context of tensors without data, dense or with given r."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if workload.config.train.precision == "float64" else torch.float32)
    try:
        # Messages of SyncBatchNorm carry no gradients, and its layers are for GPUs.
        workload = workload.with_train(sync_batch_norm=False)
        context = workload.run_context(engine, batch=batch, rule=rule)
    finally:
        torch.set_default_dtype(before)
    # A scaler selects by values.
    context.scaler = torch.amp.GradScaler("cpu", enabled=False)
    if r:
        context.controller.load_state_dict({"t": 1, "updates": 0, "r": dict(r), "streaks": {}})
    return context


def _update(context: RunContext) -> None:
    # Tensor parallelism clips by values; that takes only a number per parameter.
    clip = None if isinstance(context.engine, TensorEngine) else context.config.train.gradient_clip
    context.engine.update(context.optimizer, context.scaler, trained_parameters(context), clip)


def _resident(context: RunContext) -> Resident:
    parameters = list(context.module.parameters())
    trained = [local(p).nbytes for p in parameters if p.requires_grad]
    return Resident(
        trained=sum(trained),
        frozen=sum(local(p).nbytes for p in parameters if not p.requires_grad),
        buffers=sum(b.nbytes for b in context.module.buffers()),
        state=sum(local(t).nbytes for t in resident_tensors(context.optimizer)),
        largest=max(trained),
    )


def trace_event(
    workload: Workload, phase: Phase, rule: RankRule | None, *, processes: int, held: bool
) -> float:
    """Most bytes of one process during the event at the beginning of ``phase``; replicated matrices.

    The SVDs are distributed over ``processes``; as many results are alive at once. ``held``: the old parameters are
    kept until the end, as ``DistributedDataParallel`` keeps them.
    """
    with fake_world(0, processes) as world, fake_tensors(), fake_collectives():
        update = phase.event == "update"
        r = {name: phase.before.get(name, r) for name, r in phase.r.items()} if update else {}
        run = ScriptedRun(traced_context(workload, SingleEngine(world), batch=1, r=r, rule=rule))
        # With made-up values all bases would be repaired, which a real first update does not do.
        run.method.config.orthogonality_bound = math.inf
        for parameter in trained_parameters(run.context):
            parameter.grad = torch.empty_like(parameter)
        # The optimizer makes its state.
        _update(run.context)
        held_parameters = list(run.context.module.parameters()) if held else []
        del parameter
        tracer = Tracer(resident_tensors(run.context.module, run.context.optimizer), counted=True)
        with tracer:
            run.update() if update else run.convert()
        del held_parameters
        return float(max(tracer.trace.live))


# -- many numbers of processes from a few traced steps -------------------------------------------------


class StepTraces:
    """Traced steps of a workload, each made once.

    Every quantity of a step is a constant, plus a part per sample of the process, plus a part sharded over processes.
    So it is linear in the samples, or in 1 / processes.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self._cache: dict[tuple[str, int, int, tuple[int, ...]], Step] = {}

    def steps(self, deployments: Sequence[Deployment], r: Mapping[str, int]) -> dict[Deployment, Step]:
        """A step of every deployment of one engine; the smallest and largest are traced, those between interpolated.

        Where the operations of two differ, e.g. because layers compute another way with fewer tokens, the one in the
        middle is traced too.
        """
        many = sorted({d for d in deployments if d.processes > 1}, key=lambda d: (1.0 / d.processes, d.batch))
        ends = {*many[:1], *many[-1:], *(d for d in deployments if d.processes == 1)}
        found = {d: self._traced(d, r) for d in ends}
        pending = [many]
        while pending:
            row = pending.pop()
            if len(row) < 3:
                continue
            low, high = row[0], row[-1]
            if _operations(found[low]) == _operations(found[high]):
                for d in row[1:-1]:
                    found[d] = _between(found[low], found[high], _weight(low, d, high), d)
                continue
            at = len(row) // 2
            found[row[at]] = self._traced(row[at], r)
            pending += [row[: at + 1], row[at:]]
        return found

    def _traced(self, d: Deployment, r: Mapping[str, int]) -> Step:
        key = ("" if d.bare else repr(d.engine), 1 if d.bare else d.processes, d.batch, tuple(r.values()))
        if key not in self._cache:
            self._cache[key] = trace_step(self.workload, d, r)
        return self._cache[key]


def _operations(step: Step) -> list[object]:
    traces = step.passes, step.update
    return [(len(t.live), [(m.collective, m.stride > 1) for m in t.messages]) for t in traces]


def _weight(low: Deployment, d: Deployment, high: Deployment) -> float:
    """Where ``d`` lies between two others: 0 at ``low``, 1 at ``high``."""
    if d.bare and low.batch != high.batch:
        return (d.batch - low.batch) / (high.batch - low.batch)
    return (1 / d.processes - 1 / low.processes) / (1 / high.processes - 1 / low.processes)


def _between(a: Step, b: Step, w: float, d: Deployment) -> Step:
    def mix(x: Any, y: Any) -> Any:
        return x + w * (y - x)

    def trace(x: Trace, y: Trace) -> Trace:
        messages = []
        for m, n in zip(x.messages, y.messages, strict=True):
            processes = m.processes if m.processes == n.processes else d.processes // m.stride
            messages.append(replace(m, size=mix(m.size, n.size), processes=processes))
        flops = Counter({dtype: round(mix(x.flops[dtype], y.flops[dtype])) for dtype in x.flops})
        live, gradients = mix(np.array([x.live, x.gradients]), np.array([y.live, y.gradients])).tolist()
        return Trace(live, gradients, flops, mix(x.moved, y.moved), messages)

    resident = Resident(*map(mix, astuple(a.resident), astuple(b.resident)))
    return Step(resident, trace(a.passes, b.passes), trace(a.update, b.update), a.half)
