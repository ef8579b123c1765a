"""Memory of one process in a step, from a rehearsed one, by engine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpc_oialr.engines import DDP, DeepSpeed, EngineConfig
from hpc_oialr.engines.deepspeed_json import BUFFERS_IN_MODEL, LIVE_PARTS_IN_MODEL
from hpc_oialr.plan.recorder import Record
from hpc_oialr.plan.rehearsal import Step, Tensors


@dataclass(frozen=True)
class Footprint:
    """Bytes of one process.

    Attributes
    ----------
    parameters, state, gradients
        Between steps; gradients only where they keep their place, as in DDP's buckets or a partition of ZeRO's.
    activations
        The highest of everything else in a step, gradients on their way included.
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
    """What one of ``processes`` holds in a step that :func:`hpc_oialr.plan.rehearsal.rehearse` has seen.

    DDP: all that one process alone holds, with every gradient in a bucket at all times. ZeRO: a formula of its
    partitions around the activations of the bare module. FSDP and TensorParallel were rehearsed as they are.
    """
    tensors = step.tensors
    if processes == 1:
        return _of(tensors, 0.0, highest(step, share=1.0))
    if isinstance(engine, DDP):
        kept = 0.0 if engine.gradient_as_bucket_view else highest(step, share=1.0)
        return _of(tensors, tensors.trained, max(kept, highest(step, share=0.0)))
    if isinstance(engine, DeepSpeed):
        return _zero(step, engine, processes)
    return _of(tensors, 0.0, highest(step, share=1.0))


def highest(step: Step, *, share: float) -> float:
    """Most bytes of what a step makes, with this share of every gradient that is in place."""
    curves = (_curve(record, share) for record in (step.forward_backward, step.update))
    return max(float(curve.max(initial=0.0)) for curve in curves)


def _curve(record: Record, share: float) -> NDArray[np.float64]:
    live, gradients = np.asarray(record.live, dtype=float), np.asarray(record.gradients, dtype=float)
    return live - (1.0 - share) * gradients


def _of(tensors: Tensors, gradients: float, activations: float) -> Footprint:
    parameters = tensors.trained + tensors.frozen + tensors.buffers
    return Footprint(parameters, tensors.state, gradients, activations)


def _zero(step: Step, engine: DeepSpeed, processes: int) -> Footprint:
    """Stages 1 and 2 deal fp32 values, moments and gradients; stage 3 parameters too, but what is gathered.

    Gradients travel through a buffer of 1/32 of them; stage 3 has at most 1/8 of the model gathered at once.
    """
    tensors, share = step.tensors, 1.0 / processes
    masters, state = share * tensors.trained, share * tensors.state
    buffer = tensors.trained / BUFFERS_IN_MODEL
    activations = _curve(step.forward_backward, share).max(initial=0.0) + buffer
    model = tensors.trained + tensors.frozen
    if engine.stage < 3:
        return Footprint(model + tensors.buffers + masters, state, 0.0, activations)
    gathered = model / LIVE_PARTS_IN_MODEL
    return Footprint(
        share * model + tensors.buffers + masters, state, share * tensors.trained, activations + gathered
    )
