"""How many processes, where, and what share of the batch each has."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_oialr.engines import EngineConfig, Single, TensorParallel
from hpc_oialr.plan.network import Placement
from hpc_oialr.plan.recorder import Message


@dataclass(frozen=True)
class Place:
    """A number of nodes, with processes on each, and one process's samples a step."""

    nodes: int
    per_node: int
    batch: int

    @property
    def processes(self) -> int:
        """In all."""
        return self.nodes * self.per_node


def data_processes(engine: EngineConfig, processes: int) -> int:
    """Processes, or groups of them that share samples, over which a global batch is dealt."""
    return processes // engine.size if isinstance(engine, TensorParallel) and processes > 1 else processes


def misfit(
    engine: EngineConfig, processes: int, *, global_batch: int, accumulation: int, optimizer: str
) -> str | None:
    """Why an engine cannot work with so many processes and this batch, or None."""
    name = type(engine).__name__
    if processes == 1:
        return None
    if isinstance(engine, Single):
        return "Single is for one process"
    if isinstance(engine, TensorParallel) and processes % engine.size:
        return f"{name} needs a multiple of {engine.size} processes"
    if name == "DeepSpeed" and optimizer == "MuonAdamW":
        return "ZeRO cuts matrices into flat pieces, which Muon cannot step"
    groups = data_processes(engine, processes)
    if global_batch % groups or (global_batch // groups) % accumulation:
        nearest = max(1, round(global_batch / (groups * accumulation))) * groups * accumulation
        return f"{global_batch} samples cannot be dealt to {groups} processes; {nearest} can, or take --weak"
    return None


def placement(message: Message, place: Place) -> Placement:
    """Where the members of a message's group are: neighbours in rank, or as many apart as share a model."""
    if message.processes >= place.processes:
        return Placement(place.nodes, place.per_node)
    if message.stride == 1:
        inside = min(message.processes, place.per_node)
        return Placement(message.processes // inside, inside, groups=place.per_node // inside)
    inside = max(1, place.per_node // message.stride)
    return Placement(max(1, message.processes // inside), inside, groups=min(message.stride, place.per_node))


def label(engine: EngineConfig) -> str:
    """An engine's name, with the setting that matters most.

    Examples
    --------
    >>> from hpc_oialr.engines import DDP, TensorParallel
    >>> label(DDP()), label(TensorParallel(size=4))
    ('DDP', 'TensorParallel size 4')
    """
    name = type(engine).__name__
    setting = {"TensorParallel": "size", "DeepSpeed": "stage", "FSDP": "replicas"}.get(name)
    value = getattr(engine, setting) if setting else 1
    return name if value == 1 and name != "DeepSpeed" else f"{name} {setting} {value}"
