"""What a process sends in a step, by engine: traced, or by formula for engines that work on real tensors only."""

from __future__ import annotations

from collections.abc import Mapping

from hpc_oialr.engines import DDP, DeepSpeed, EngineConfig
from hpc_oialr.engines.ddp import bucket_mb
from hpc_oialr.plan.schedule import LayerShape, Phase
from hpc_oialr.plan.trace_step import Step
from hpc_oialr.plan.tracer import Message


def messages(step: Step, engine: EngineConfig, processes: int) -> list[Message]:
    """All messages of a step.

    DDP: every gradient once, in buckets, and the model's buffers. ZeRO 1 and 2: every gradient is reduced and
    scattered, every trained parameter gathered; ZeRO 3 gathers every parameter twice.
    """
    if processes == 1:
        return []
    resident = step.resident
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


def event_messages(phase: Phase, shapes: Mapping[str, LayerShape], processes: int) -> list[Message]:
    """Factors of every layer that an event works on, in fp32: values and new bases, or both rotations of a core."""
    if processes == 1:
        return []
    sent = []
    for name, r in phase.before.items():
        numbers = 2 * r * r + r + 2
        if phase.event == "conversion":
            shape = shapes[name]
            numbers = shape.k + phase.r[name] * (shape.m + shape.n)
        sent.append(Message("broadcast", 4.0 * numbers, processes))
    return sent
