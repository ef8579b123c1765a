"""A training step, or an event of the method, by the run's own code on tensors without data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from hpc_oialr.engines import DDP, DeepSpeed, EngineConfig, FSDPEngine, SingleEngine, TensorEngine
from hpc_oialr.lowrank.layout import local
from hpc_oialr.method.basis import BasisUpdater
from hpc_oialr.method.decompositions import core_rotations, weight_factors
from hpc_oialr.method.engine import Engine
from hpc_oialr.method.oialr import OIALR
from hpc_oialr.optim.stack import OptimizerStack
from hpc_oialr.plan.fake_world import fake_collectives, fake_tensors, fake_world
from hpc_oialr.plan.schedule import LayerShape, Phase
from hpc_oialr.plan.tracer import Trace, Tracer
from hpc_oialr.plan.workload import Workload
from hpc_oialr.record.memory import resident_tensors
from hpc_oialr.train.one_step import forward_backward
from hpc_oialr.train.run_context import AUTOCAST, RunContext


@dataclass(frozen=True)
class Resident:
    """Bytes that live between steps on one process.

    Attributes
    ----------
    trained, frozen
        Parameters with and without gradients; the bases have none.
    buffers
        Of the model.
    state
        The optimizer's.
    largest
        The largest trained parameter.
    """

    trained: float
    frozen: float
    buffers: float
    state: float
    largest: float


@dataclass(frozen=True)
class Step:
    """One step of one process: forward and backward pass, then the optimizer's update.

    Attributes
    ----------
    half
        Whether the precision is "bf16" or "fp16".
    """

    resident: Resident
    passes: Trace
    update: Trace
    half: bool = False

    @property
    def flops(self) -> float:
        """Of all dtypes."""
        return float(sum(self.passes.flops.values()) + sum(self.update.flops.values()))


def trace_step(
    workload: Workload, engine: EngineConfig, *, processes: int, batch: int, r: Mapping[str, int]
) -> Step:
    """One step of process 0, which has the most of everything.

    ``DDP`` and ``DeepSpeed`` work on real tensors only; for them it is the step of the bare module.

    Parameters
    ----------
    batch
        Samples per process and step.
    r
        Inner dimension of every low-rank layer; empty: all layers are dense.
    """
    bare = isinstance(engine, (DDP, DeepSpeed))
    with fake_world(0, 1 if bare else processes) as world:
        built = engine.build(world, workload.config.train.precision)
        with fake_tensors():
            context = traced_context(workload, built, batch=batch, r=r)
            context.module.train()
            resizing = isinstance(context.engine, FSDPEngine)
            forward = Tracer(resident_tensors(context.module, context.optimizer), resizing=resizing)
            with _gradients_noted(context, forward), forward:
                # Made here, so that it counts: on a GPU it is copied there in each step.
                samples = workload.batch(batch)
                forward_backward(context, samples, 0)
            # The optimizer makes its state in its first update; the second one is like all others.
            _update(context)
            update = Tracer(resident_tensors(context.module, context.optimizer), resizing=resizing)
            for parameter in trained_parameters(context):
                parameter.grad = torch.empty_like(parameter)
                update.note_gradient(parameter)
            with update:
                _update(context)
            half = workload.config.train.precision in AUTOCAST
            return Step(_resident(context), forward.trace, update.trace, half)


def traced_context(workload: Workload, engine: Engine, *, batch: int, r: Mapping[str, int]) -> RunContext:
    """A context of tensors without data, dense or with given r."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if workload.config.train.precision == "float64" else torch.float32)
    try:
        # Its messages carry no gradients, and its layers are for GPUs.
        context = workload.with_train(sync_batch_norm=False).run_context(engine, batch=batch)
    finally:
        torch.set_default_dtype(before)
    # Selects by values.
    context.scaler = torch.amp.GradScaler("cpu", enabled=False)
    if r:
        assert isinstance(context.controller, OIALR)
        context.controller.load_state_dict({"t": 1, "updates": 0, "r": dict(r), "streaks": {}})
    return context


def trained_parameters(context: RunContext) -> list[torch.nn.Parameter]:
    """Parameters with gradients."""
    return [p for p in context.module.parameters() if p.requires_grad]


@contextmanager
def _gradients_noted(context: RunContext, tracer: Tracer) -> Iterator[None]:
    """FSDP2 sets gradients of its parameters itself, later; there all memory is counted together."""
    if isinstance(context.engine, FSDPEngine):
        yield
        return
    handles = [
        p.register_post_accumulate_grad_hook(tracer.note_gradient) for p in trained_parameters(context)
    ]
    yield
    for handle in handles:
        handle.remove()


def _update(context: RunContext) -> None:
    clip = context.config.train.gradient_clip
    if isinstance(context.engine, TensorEngine):
        # Selects by values; what it holds is a number per parameter.
        clip = None
    context.engine.update(context.optimizer, context.scaler, trained_parameters(context), clip)


def _resident(context: RunContext) -> Resident:
    parameters = list(context.module.parameters())
    return Resident(
        trained=sum(local(p).nbytes for p in parameters if p.requires_grad),
        frozen=sum(local(p).nbytes for p in parameters if not p.requires_grad),
        buffers=sum(b.nbytes for b in context.module.buffers()),
        state=sum(local(t).nbytes for t in resident_tensors(context.optimizer)),
        largest=max(local(p).nbytes for p in parameters if p.requires_grad),
    )


def trace_event(workload: Workload, phase: Phase, *, processes: int, held: bool) -> float:
    """Most bytes of one process during the event at the beginning of ``phase``; replicated matrices.

    The SVDs are distributed over ``processes``; as many results as there are processes live at once.

    Parameters
    ----------
    held
        Whether something holds the old parameters until the end, as ``DistributedDataParallel`` does.
    """
    with fake_world(0, processes) as world, fake_tensors(), fake_collectives():
        r = (
            {name: phase.before.get(name, r) for name, r in phase.r.items()}
            if phase.event == "update"
            else {}
        )
        context = traced_context(workload, SingleEngine(world), batch=1, r=r)
        controller, trained = context.controller, trained_parameters(context)
        assert isinstance(controller, OIALR)
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        # Makes the optimizer's state.
        context.engine.update(context.optimizer, context.scaler, trained, None)
        keep_alive = list(context.module.parameters()) if held else []
        del trained, parameter
        tracer = Tracer(resident_tensors(context.module, context.optimizer), counted=True)
        targets = [target for target in controller.targets if target.name in phase.before]
        stack = OptimizerStack(context.optimizer)
        with tracer, torch.no_grad():
            # As OIALR does it, with the planned r.
            changes = BasisUpdater(context.module, stack, controller.config, (), context.engine)
            if phase.event == "conversion":
                kept = [phase.r[target.name] for target in targets]
                for factors in weight_factors(targets, kept, context.engine):
                    i = factors.index
                    changes.convert(targets[i], factors.U, factors.s[: kept[i]], factors.Vh)
            else:
                for core in core_rotations(targets, context.engine):
                    target = targets[core.index]
                    r_new = phase.r[target.name]
                    assert target.low_rank is not None
                    P, S, Qh = core.P[:, :r_new], core.s[:r_new], core.Qh[:r_new]
                    changes.rotate(target.low_rank, target.name, P, S, Qh, repair=False)
        del keep_alive
        return float(max(tracer.trace.live))


def sharded_event_bytes(shapes: Mapping[str, LayerShape], phase: Phase, processes: int) -> float:
    """Bytes beside what lives between steps, in fp32, where matrices are sharded over ``processes``; a formula.

    One layer at a time. At the conversion (TSQR) process 0 has a copy of its rows, two k x k factors per level of
    the tree, U and Vh of the last one and its own basis; at an update both factors of a core twice.
    """
    if phase.event == "update":
        return 4.0 * max(6.0 * r * r for r in phase.before.values())
    levels = math.ceil(math.log2(processes))
    return 4.0 * max(
        2.0 * shapes[name].m * shapes[name].n / processes + (2 * levels + 6) * k * k
        for name, k in phase.before.items()
    )
