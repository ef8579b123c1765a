"""How long a step and an event of the method take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hpc_oialr.engines import EngineConfig, TensorParallel
from hpc_oialr.linalg.work_plan import LayerWork, WorkPlan, svd_cost
from hpc_oialr.plan.device import Device, Work
from hpc_oialr.plan.network import Network
from hpc_oialr.plan.places import Place, placement
from hpc_oialr.plan.recorder import Message
from hpc_oialr.plan.rehearsal import Step
from hpc_oialr.plan.sequence import Phase, Shape
from hpc_oialr.plan.traffic import messages, total_bytes

# Of forward and backward pass, the part that the backward pass takes, and beside which gradients can travel.
BACKWARD_SHARE = 2 / 3


@dataclass(frozen=True)
class Machine:
    """What processes compute on, and what they send over."""

    device: Device
    network: Network


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step.

    Attributes
    ----------
    compute_s
        Forward, backward and the optimizer's step.
    waiting_s
        Messages that nothing goes on beside.
    sent_bytes
        Bytes of the whole tensors that messages are about.
    """

    compute_s: float
    waiting_s: float
    sent_bytes: float

    @property
    def total_s(self) -> float:
        """Of the step."""
        return self.compute_s + self.waiting_s


def step_time(
    step: Step, engine: EngineConfig, place: Place, machine: Machine, measured_s: float | None = None
) -> StepTime:
    """Time of a step by roofline and latency-bandwidth model.

    Parameters
    ----------
    measured_s
        Of the same step on one process alone, with the cores that one of ``place`` has; goes before the roofline.
    """
    device = machine.device
    if measured_s is None:
        passes_s = device.seconds(step.forward_backward.work, place.per_node)
        compute_s = passes_s + device.seconds(step.update.work, place.per_node)
    else:
        compute_s = measured_s * device.slowdown(place.per_node)
        passes_s = compute_s
    sent = messages(step, engine, place)
    hidden_s = device.overlap * BACKWARD_SHARE * passes_s
    blocking = [m for m in sent if _blocks(m, engine)]
    beside_s = network_time([m for m in sent if m not in blocking], place, machine)
    waiting_s = network_time(blocking, place, machine) + max(0.0, beside_s - hidden_s)
    return StepTime(compute_s, waiting_s, total_bytes(sent))


def _blocks(message: Message, engine: EngineConfig) -> bool:
    """Activations of tensor parallelism must be there before the next layer begins."""
    return isinstance(engine, TensorParallel) and message.stride == 1 and message.processes == engine.size


def network_time(sent: Sequence[Message], place: Place, machine: Machine) -> float:
    """Messages one after another (s)."""
    seconds = machine.network.seconds
    return sum(seconds(m.collective, m.size, placement(m, place)) for m in sent)


@dataclass(frozen=True)
class EventTime:
    """Seconds of a conversion or an update.

    Attributes
    ----------
    svd_s
        Until the last process has its last factors.
    waiting_s
        Factors under way.
    change_s
        New bases, and moments carried into them.
    sent_bytes
        Of all factors together.
    """

    svd_s: float
    waiting_s: float
    change_s: float
    sent_bytes: float

    @property
    def total_s(self) -> float:
        """Of the event."""
        return self.svd_s + self.waiting_s + self.change_s


def event_time(
    phase: Phase, shapes: Mapping[str, Shape], place: Place, machine: Machine, *, split: bool
) -> EventTime:
    """Time of the event at the beginning of a phase.

    Parameters
    ----------
    split
        Whether matrices are split over processes: all work on each, one after another (TSQR). Otherwise each
        layer's SVD is done whole by one of them, dealt by cost.
    """
    jobs = [_job(shapes[name], phase, name) for name in phase.before]
    device, share = machine.device, place.per_node
    speed = (
        device.svd_flops
        * (device.threads(share) / device.cores if device.cores else 1.0)
        / device.slowdown(share)
    )
    svd_s = _split_flops(jobs, phase, place) / speed if split else _dealt_flops(jobs, place) / speed
    sent = [Message("broadcast", 4.0 * job.numbers, place.processes) for job in jobs]
    waiting_s = network_time(sent, place, machine) if place.processes > 1 else 0.0
    change = Work({"float32": sum(job.change_flops for job in jobs)}, 0.0, 20.0 * len(jobs))
    return EventTime(svd_s, waiting_s, device.seconds(change, share), total_bytes(sent))


@dataclass(frozen=True)
class _Job:
    m: int
    n: int
    numbers: float
    change_flops: float


def _job(shape: Shape, phase: Phase, name: str) -> _Job:
    """An SVD, the numbers of its result that travel, and what is done with them on every process."""
    r = phase.before[name]
    if phase.event == "conversion":
        kept = phase.r[name]
        # Two moments into the new basis.
        return _Job(shape.m, shape.n, shape.k + kept * (shape.m + shape.n), 4.0 * shape.m * shape.n * kept)
    return _Job(r, r, 2.0 * r * r + r + 2, 2.0 * r * phase.r[name] * (shape.m + shape.n))


def _dealt_flops(jobs: Sequence[_Job], place: Place) -> float:
    """On the critical path: of each round the costliest task, as the method deals them."""
    plan = WorkPlan.of([LayerWork("", job.m, job.n) for job in jobs], place.processes)
    return sum(max(task.load for task in tasks) for tasks in plan.rounds())


def _split_flops(jobs: Sequence[_Job], phase: Phase, place: Place) -> float:
    """Of weights one after another, on all processes together; of cores whole, as they are dealt."""
    if phase.event == "update":
        return _dealt_flops(jobs, place)
    return sum(svd_cost(job.m, job.n, place.processes) for job in jobs)


def with_measured_event(
    machine: Machine, phase: Phase, shapes: Mapping[str, Shape], measured_s: float
) -> Machine:
    """The machine with SVDs as fast as a conversion on one process, alone on its node, has shown."""
    expected = event_time(phase, shapes, Place(1, 1, 1), machine, split=False)
    svd_s = max(measured_s - expected.change_s, 0.1 * measured_s)
    device = replace(machine.device, svd_flops=machine.device.svd_flops * expected.svd_s / svd_s)
    return replace(machine, device=device)
