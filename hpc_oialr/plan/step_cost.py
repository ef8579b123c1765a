"""Memory, messages and time of a step and of an event on one process, by engine.

FSDP and TensorParallel are traced as they are. DDP and DeepSpeed work on real tensors only: the bare module is
traced, and formulas add buckets, partitions and messages. Compute time is measured (``oialr plan --probe``) or counted
operations over the machine's speeds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hpc_oialr.engines import DDP, DeepSpeed, TensorParallel
from hpc_oialr.engines.ddp import bucket_mb
from hpc_oialr.engines.deepspeed_json import BUFFERS_IN_MODEL, LIVE_PARTS_IN_MODEL
from hpc_oialr.linalg.work_plan import LayerWork, svd_cost, svd_rounds
from hpc_oialr.plan.machine import Machine
from hpc_oialr.plan.schedule import Phase
from hpc_oialr.plan.trace_step import Step
from hpc_oialr.plan.tracer import Message, Trace
from hpc_oialr.plan.workload import Deployment

# Share of the backward pass, during which gradients can be sent, of forward and backward pass.
BACKWARD_SHARE = 2 / 3
NOTHING: Mapping[str, int] = {}


@dataclass(frozen=True)
class Footprint:
    """Bytes of one process."""

    parameters: float
    state: float
    gradients: float  # only where they stay allocated between steps: DDP's buckets, a partition of ZeRO's
    activations: float  # the highest of everything else in a step, temporary gradients included

    @property
    def resident(self) -> float:
        """Between steps."""
        return self.parameters + self.state + self.gradients

    @property
    def peak(self) -> float:
        """The highest in a step."""
        return self.resident + self.activations


def footprint(step: Step, d: Deployment) -> Footprint:
    """Memory of one process in a step of :func:`hpc_oialr.plan.trace_step.trace_step`.

    DDP: that of a single process, with every gradient in a bucket at all times. ZeRO: a formula of its partitions,
    around the activations of the bare module.
    """
    model, engine = step.resident, d.engine
    parameters = model.trained + model.frozen + model.buffers
    alone = max(_highest(step.passes, 1.0), _highest(step.update, 1.0))
    if d.processes == 1 or not isinstance(engine, (DDP, DeepSpeed)):
        return Footprint(parameters, model.state, 0.0, alone)
    if isinstance(engine, DDP):
        in_buckets = max(_highest(step.passes, 0.0), _highest(step.update, 0.0))
        beside = in_buckets if engine.gradient_as_bucket_view else max(alone, in_buckets)
        return Footprint(parameters, model.state, model.trained, beside)
    # In half precision the module and its gradients are half, with fp32 values of trained parameters on top; stages 1
    # and 2 have those in fp32 too. They, moments and gradients are sharded, and gradients pass through a buffer;
    # stage 3 also shards parameters, except those gathered at the moment. The optimizer steps each process's
    # part as one flat parameter.
    share, width = 1.0 / d.processes, 0.5 if step.half else 1.0
    module, gradients = width * (model.trained + model.frozen), width * share * model.trained
    state, masters = share * model.state, share * model.trained
    buffer = width * model.trained / BUFFERS_IN_MODEL
    flat = masters * _highest(step.update, 0.0) / model.largest
    if engine.stage == 3:
        passes = _highest(step.passes, 0.0) + buffer + module / LIVE_PARTS_IN_MODEL
        sharded = share * module + model.buffers + (masters if step.half else 0.0)
        return Footprint(sharded, state, gradients, max(passes, flat))
    # Stage 1 has its part of the gradients twice.
    passes = _highest(step.passes, width * share) + buffer + (gradients if engine.stage == 1 else 0.0)
    return Footprint(module + model.buffers + masters, state, 0.0, max(passes, gradients + flat))


def _highest(trace: Trace, share: float) -> float:
    """Most bytes of what a trace made, with this share of every gradient."""
    live, gradients = np.asarray(trace.live, dtype=float), np.asarray(trace.gradients, dtype=float)
    return float((live - (1.0 - share) * gradients).max(initial=0.0))


def sharded_event_bytes(
    shapes: Mapping[str, tuple[int, int]], phase: Phase, processes: int, *, whole_bases: bool = False
) -> float:
    """Bytes of an event, in fp32, on top of resident ones, where matrices are sharded over ``processes``; a formula.

    One layer at a time. At the conversion (TSQR) rank 0 has a copy of its rows, two k x k factors per level of the
    tree, U and Vh of the last one and its own basis; at an update both factors of a core twice. ``whole_bases`` of all
    layers come on top at a conversion, which frees shards of weights meanwhile; at an update those of one.
    """
    bases = {name: whole_bases * phase.r[name] * sum(shapes[name]) for name in phase.before}
    if phase.event == "update":
        return 4.0 * max(6.0 * r * r + bases[name] for name, r in phase.before.items())
    levels = math.ceil(math.log2(processes))
    largest = max(
        2.0 * math.prod(shapes[name]) / processes + (2 * levels + 6) * k * k for name, k in phase.before.items()
    )
    return 4.0 * (largest + sum(bases.values()))


def messages(step: Step, d: Deployment) -> list[Message]:
    """All messages of a step.

    DDP: every gradient once, in buckets, and the model's buffers. ZeRO 1 and 2: every gradient is reduced and
    scattered, every trained parameter gathered; ZeRO 3 gathers every parameter twice.
    """
    engine, processes, resident = d.engine, d.processes, step.resident
    if processes == 1:
        return []
    if isinstance(engine, DDP):
        sent = [Message("broadcast", resident.buffers, processes)] if resident.buffers else []
        left = resident.trained
        cap = (engine.bucket_cap_mb or bucket_mb(left)) * 1024**2
        while left > 0:
            sent.append(Message("all_reduce", min(left, cap), processes))
            left -= cap
        return sent
    if isinstance(engine, DeepSpeed):
        # In half precision so is the module.
        width = 0.5 if step.half else 1.0
        scattered = Message("reduce_scatter", width * resident.trained, processes)
        if engine.stage < 3:
            return [scattered, Message("all_gather", width * resident.trained, processes)]
        gathered = Message("all_gather", width * (resident.trained + resident.frozen), processes)
        return [scattered, gathered, gathered]
    return [*step.passes.messages, *step.update.messages]


def event_messages(
    phase: Phase,
    shapes: Mapping[str, tuple[int, int]],
    processes: int,
    moments: Mapping[str, int] = NOTHING,
    *,
    whole_bases: bool = False,
    growth: Mapping[str, int] = NOTHING,
) -> list[Message]:
    """Factors of every layer of an event, in fp32: values and new bases, or both rotations of a core.

    So many numbers of second ``moments`` of a layer are reduced first, and what they choose is sent beside.
    ``whole_bases`` that are changed in shards are gathered afterwards. At an update bases may grow, by sketches of
    ``growth`` columns, by layer, which are summed over all processes.
    """
    if processes == 1:
        return []
    sent = [Message("all_reduce", 4.0 * numbers, processes) for numbers in moments.values()]
    gathered = [4.0 * phase.r[name] * sum(shapes[name]) for name in phase.before] if whole_bases else []
    sent += [Message("all_gather", size, processes) for size in gathered]
    sent += [Message("all_reduce", 4.0 * q * sum(shapes[name]), processes) for name, q in growth.items()]
    for name, r in phase.before.items():
        numbers = (2 * r * r + r) * (1 + (name in moments)) + 2
        if phase.event == "conversion":
            numbers = min(shapes[name]) + phase.r[name] * sum(shapes[name]) + (phase.r[name] + 1) * (name in moments)
        sent.append(Message("broadcast", 4.0 * numbers, processes))
    return sent


def step_time(
    step: Step, sent: Sequence[Message], d: Deployment, machine: Machine, measured_s: float | None = None
) -> tuple[float, float]:
    """Seconds of a step: computing, and waiting for messages.

    ``measured_s``: the same step on one process alone, with as many cores as in ``d``; preferred to counted operations.
    """
    if measured_s is None:
        passes_s = _counted_s(step.passes, machine, d)
        compute_s = passes_s + _counted_s(step.update, machine, d)
    else:
        passes_s = compute_s = measured_s * machine.slowdown(d.per_node)
    # Activations of tensor parallelism must arrive before the next layer; gradients may be sent meanwhile.
    tensor = d.engine.size if isinstance(d.engine, TensorParallel) else 0
    blocking = [m for m in sent if tensor and m.stride == 1 and m.processes == tensor]
    beside_s = machine.messages_s([m for m in sent if m not in blocking], d.per_node)
    hidden_s = machine.overlap * BACKWARD_SHARE * passes_s
    return compute_s, machine.messages_s(blocking, d.per_node) + max(0.0, beside_s - hidden_s)


def _counted_s(trace: Trace, machine: Machine, d: Deployment) -> float:
    slowest = min(machine.flops.values())
    products_s = sum(n / machine.flops.get(dtype, slowest) for dtype, n in trace.flops.items())
    busy_s = (products_s + trace.moved / machine.bytes_per_s) / machine.speed(d.per_node)
    return max(busy_s, len(trace.live) * machine.launch_s)


def svd_seconds(
    phase: Phase,
    shapes: Mapping[str, tuple[int, int]],
    d: Deployment,
    machine: Machine,
    moments: Collection[str] = (),
) -> float:
    """Time of an event's SVDs, until the last process has finished.

    Sharded weights are decomposed one after another by all processes (TSQR); all other SVDs are distributed by cost.
    Layers with second ``moments`` need two more, of r x r and of what is kept.
    """
    sizes = [(r, r) for r in phase.before.values()]
    if phase.event == "conversion":
        sizes = [shapes[name] for name in phase.before]
    more = [svd_cost(r, r) + svd_cost(r, phase.r[name]) if name in moments else 0.0 for name, r in phase.before.items()]
    if d.sharded and phase.event == "conversion":
        flops = sum(svd_cost(m, n, d.processes) for m, n in sizes) + sum(more)
    else:
        rounds = svd_rounds([LayerWork("", m, n) for m, n in sizes], d.processes)
        flops = sum(max(task.load + sum(more[i] for i in task.layers) for task in tasks) for tasks in rounds)
    return flops / (machine.svd_flops * machine.speed(d.per_node))
