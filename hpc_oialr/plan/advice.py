"""What to do where a run does not fit into the memory."""

from __future__ import annotations

from collections.abc import Sequence

from hpc_oialr.engines import DDP, FSDP, DeepSpeed, EngineConfig, TensorParallel
from hpc_oialr.plan.forecast import Forecast
from hpc_oialr.plan.places import label
from hpc_oialr.plan.planner import Planner

GIB = 1024**3


def all_engines(per_node: int) -> list[EngineConfig]:
    """One of each kind, tensor parallelism within a node."""
    engines: list[EngineConfig] = [DDP(), FSDP()]
    if per_node > 1:
        engines.append(TensorParallel(size=per_node))
    return [*engines, *(DeepSpeed(stage=stage) for stage in (1, 2, 3))]


def fits(forecast: Forecast, memory_gib: float) -> bool:
    """Whether the highest of the run is within the memory of a process."""
    return forecast.misfit is None and forecast.peak <= memory_gib * GIB


def advice(planner: Planner, forecast: Forecast, nodes: Sequence[int], memory_gib: float) -> str:
    """For a run that does not fit: engines that do on as many nodes, or on how many more, or what else to try."""
    per_node, here = forecast.place.per_node, forecast.place.nodes
    for count in (here, *(n for n in sorted(nodes) if n > here)):
        others = [engine for engine in all_engines(per_node) if label(engine) != label(forecast.engine)]
        tried = [planner.forecast([count], per_node, engine)[0] for engine in others]
        good = [f"{label(f.engine)} ({f.peak / GIB:.2f} GiB)" for f in tried if fits(f, memory_gib)]
        if good:
            where = "" if count == here else f" on {count} nodes"
            return f"fits with {', '.join(good)}{where}"
    config = planner.subject.config.train
    if not config.activation_checkpointing:
        return "no engine fits; try --train.activation_checkpointing true, or a smaller --train.global_batch"
    return "no engine fits; try a smaller --train.global_batch or a larger --train.accumulation"
