"""What a process sends in a step, by engine; counted where it was rehearsed, by formula where it was not."""

from __future__ import annotations

from collections.abc import Iterator

from hpc_oialr.engines import DDP, DeepSpeed, EngineConfig
from hpc_oialr.engines.ddp import bucket_mb
from hpc_oialr.plan.places import Place
from hpc_oialr.plan.recorder import Message
from hpc_oialr.plan.rehearsal import Step


def messages(step: Step, engine: EngineConfig, place: Place) -> list[Message]:
    """All messages of a step.

    DDP: every gradient once, in buckets, and the model's buffers. ZeRO 1 and 2: every gradient reduced and
    scattered, every trained parameter gathered; ZeRO 3 gathers every parameter twice.
    """
    if place.processes == 1:
        return []
    if isinstance(engine, DDP):
        return list(_ddp(step, engine, place.processes))
    if isinstance(engine, DeepSpeed):
        return list(_zero(step, engine, place.processes))
    return [*step.forward_backward.messages, *step.update.messages]


def _ddp(step: Step, engine: DDP, processes: int) -> Iterator[Message]:
    if step.tensors.buffers:
        yield Message("broadcast", step.tensors.buffers, processes)
    left = step.tensors.trained
    cap = (engine.bucket_cap_mb or bucket_mb(left)) * 1024**2
    while left > 0:
        yield Message("all_reduce", min(left, cap), processes)
        left -= cap


def _zero(step: Step, engine: DeepSpeed, processes: int) -> Iterator[Message]:
    tensors = step.tensors
    yield Message("reduce_scatter", tensors.trained, processes)
    if engine.stage < 3:
        yield Message("all_gather", tensors.trained, processes)
        return
    yield from [Message("all_gather", tensors.trained + tensors.frozen, processes)] * 2


def total_bytes(sent: list[Message]) -> float:
    """Bytes of the whole tensors that one process's messages are about."""
    return sum(message.size for message in sent)
