"""Memory of one process in a step, from a traced one, by engine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hpc_oialr.engines import DDP, DeepSpeed, EngineConfig
from hpc_oialr.engines.deepspeed_json import BUFFERS_IN_MODEL, LIVE_PARTS_IN_MODEL
from hpc_oialr.plan.trace_step import Step
from hpc_oialr.plan.tracer import Trace


@dataclass(frozen=True)
class Footprint:
    """Bytes of one process.

    Attributes
    ----------
    parameters, state, gradients
        Between steps; gradients only where they stay allocated, as in DDP's buckets or a partition of ZeRO's.
    activations
        The highest of everything else in a step, temporary gradients included.
    """

    parameters: float
    state: float
    gradients: float
    activations: float

    @property
    def resident(self) -> float:
        """Between steps."""
        return self.parameters + self.state + self.gradients

    @property
    def peak(self) -> float:
        """The highest in a step."""
        return self.resident + self.activations


def footprint(step: Step, engine: EngineConfig, processes: int) -> Footprint:
    """What one of ``processes`` holds in a step of :func:`hpc_oialr.plan.trace_step.trace_step`.

    DDP: all that one process alone holds, with every gradient in a bucket at all times. ZeRO: a formula of its
    partitions, around the activations of the bare module. FSDP and TensorParallel are traced as they are.
    """
    model = step.resident
    parameters = model.trained + model.frozen + model.buffers
    alone = max(_highest(step.passes, 1.0), _highest(step.update, 1.0))
    if processes == 1 or not isinstance(engine, (DDP, DeepSpeed)):
        return Footprint(parameters, model.state, 0.0, alone)
    if isinstance(engine, DDP):
        in_buckets = max(_highest(step.passes, 0.0), _highest(step.update, 0.0))
        beside = in_buckets if engine.gradient_as_bucket_view else max(alone, in_buckets)
        return Footprint(parameters, model.state, model.trained, beside)
    # In half precision the module and its gradients are, and fp32 values of trained parameters come on top; stages 1
    # and 2 hold those in fp32 too. They, moments and gradients are sharded, and gradients travel through a buffer;
    # stage 3 also shards parameters, but for those that are gathered at the moment. The optimizer steps each process's
    # part as one flat parameter.
    share, width = 1.0 / processes, 0.5 if step.half else 1.0
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
