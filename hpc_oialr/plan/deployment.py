"""How many nodes and processes, under which engine, and each process's share of the batch."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_oialr.engines import DDP, FSDP, DeepSpeed, EngineConfig, Single, TensorParallel


@dataclass(frozen=True)
class Deployment:
    """Nodes, processes on each, and samples per process and step."""

    nodes: int
    per_node: int
    batch: int

    @property
    def processes(self) -> int:
        """In all."""
        return self.nodes * self.per_node


def data_processes(engine: EngineConfig, processes: int) -> int:
    """Processes, or groups of them that share samples, over which a global batch is distributed."""
    return processes // engine.size if isinstance(engine, TensorParallel) and processes > 1 else processes


def is_sharded(engine: EngineConfig, processes: int) -> bool:
    """Whether the method's matrices are sharded, so that several processes share each SVD."""
    return isinstance(engine, (FSDP, TensorParallel)) and processes > 1


def incompatibility(
    engine: EngineConfig, processes: int, global_batch: int, *, accumulation: int, optimizer: str
) -> str | None:
    """Why an engine cannot work with so many processes and this batch, or None."""
    if processes == 1:
        return None
    if isinstance(engine, Single):
        return "Single is for one process"
    if isinstance(engine, TensorParallel) and processes % engine.size:
        return f"TensorParallel needs a multiple of {engine.size} processes"
    if isinstance(engine, DeepSpeed) and optimizer == "MuonAdamW":
        return "ZeRO cuts matrices into flat pieces, which Muon cannot step"
    groups = data_processes(engine, processes)
    if global_batch % groups or (global_batch // groups) % accumulation:
        nearest = max(1, round(global_batch / (groups * accumulation))) * groups * accumulation
        return f"{global_batch} samples cannot be distributed over {groups} processes; {nearest} can, or take --weak"
    return None


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


def all_engines(per_node: int) -> list[EngineConfig]:
    """One of each kind, tensor parallelism within a node."""
    tensor: list[EngineConfig] = [TensorParallel(size=per_node)] if per_node > 1 else []
    return [DDP(), FSDP(), *tensor, *(DeepSpeed(stage=stage) for stage in (1, 2, 3))]
