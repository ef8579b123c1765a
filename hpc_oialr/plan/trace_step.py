"""A training step, or an event of the method, by the run's own code on tensors without data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hpc_oialr.engines import FSDPEngine, SingleEngine, TensorEngine
from hpc_oialr.lowrank import low_rank_layers
from hpc_oialr.lowrank.layout import local
from hpc_oialr.method.engine import Engine
from hpc_oialr.method.oialr import OIALR
from hpc_oialr.method.rules import RankRule
from hpc_oialr.plan.fake_world import fake_collectives, fake_tensors, fake_world
from hpc_oialr.plan.schedule import Phase
from hpc_oialr.plan.scripted_run import ScriptedRun, trained_parameters
from hpc_oialr.plan.tracer import Trace, Tracer
from hpc_oialr.plan.workload import NEVER, Deployment, Workload
from hpc_oialr.record.memory import resident_tensors
from hpc_oialr.train.passes import AUTOCAST
from hpc_oialr.train.run_context import RunContext
from hpc_oialr.train.trainer import forward_backward


@dataclass(frozen=True)
class Resident:
    """Bytes that live between steps on one process."""

    trained: float  # parameters with gradients
    frozen: float  # parameters without: the bases, and their copies in half precision
    buffers: float  # of the model
    state: float  # of the optimizer
    largest: float  # trained parameter


@dataclass(frozen=True)
class Step:
    """One step of one process: forward and backward pass, then the optimizer's update."""

    resident: Resident
    passes: Trace
    update: Trace
    half: bool = False  # whether the precision is bf16 or fp16


def trace_step(
    workload: Workload, d: Deployment, r: Mapping[str, int], *, trained: bool = False, growing: bool = False
) -> Step:
    """One step of rank 0, whose shards are the largest; ``r`` of every low-rank layer, empty if all are dense.

    With their bases ``trained`` or frozen; ``growing``: with sketches of gradients, all made in it.
    """
    with fake_world(0, 1 if d.bare else d.processes) as world:
        built = d.engine.build(world, workload.config.train.precision)
        with fake_tensors():
            context = traced_context(workload, built, batch=d.batch, r=r, trained=trained)
            context.module.train()
            # FSDP2 sets its parameters' gradients itself, later: they are not told apart from other memory.
            fsdp, parameters = isinstance(context.engine, FSDPEngine), trained_parameters(context)
            forward = Tracer(resident_tensors(context.module, context.optimizer), resizing=fsdp)
            noted = [] if fsdp else parameters
            handles = [p.register_post_accumulate_grad_hook(forward.note_gradient) for p in noted]
            with forward:
                if growing:
                    _open_window(context)
                # Made here, so that it counts: on a GPU it is copied there in each step.
                samples = workload.batch(d.batch)
                forward_backward(context, samples, 0)
            for handle in handles:
                handle.remove()
            # The optimizer makes its state in its first update; the second one is like all others.
            _update(context)
            update = Tracer(resident_tensors(context.module, context.optimizer), resizing=fsdp)
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
                update.note_gradient(parameter)
            with update:
                _update(context)
            half = workload.config.train.precision in AUTOCAST
            return Step(_resident(context), forward.trace, update.trace, half)


def traced_context(
    workload: Workload,
    engine: Engine,
    *,
    batch: int,
    r: Mapping[str, int],
    rule: RankRule | None = None,
    trained: bool = False,
) -> RunContext:
    """A context of tensors without data, dense or with given r, and with bases ``trained`` or frozen."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if workload.config.train.precision == "float64" else torch.float32)
    try:
        # Messages of SyncBatchNorm carry no gradients, and its layers are for GPUs.
        workload = workload.with_train(sync_batch_norm=False)
        context = workload.run_context(engine, batch=batch, rule=rule, trained=trained)
    finally:
        torch.set_default_dtype(before)
    # A scaler selects by values.
    context.scaler = torch.amp.GradScaler("cpu", enabled=False)
    if r:
        state = {"t": 1, "updates": 0, "r": dict(r), "streaks": {}}
        context.controller.load_state_dict(state | {"bases_trained": list(r) if trained else []})
        dtype = {**AUTOCAST, "bf16-params": torch.bfloat16}.get(workload.config.train.precision)
        for layer in low_rank_layers(context.module).values():
            if dtype is not None and layer.autocast_copies is not None:
                layer.autocast_copies.of(layer.U, layer.Vh, dtype)  # as after any forward pass
    return context


def _open_window(context: RunContext) -> None:
    """Gather as in the last step before an update of all layers."""
    method = context.controller
    assert isinstance(method, OIALR)
    method.config.delay, method.config.frequency, method.t, method.updates = 0, 2, 1, NEVER
    method.watch()


def _update(context: RunContext) -> None:
    # Tensor parallelism clips by values; that takes only a number per parameter.
    clip = None if isinstance(context.engine, TensorEngine) else context.config.train.gradient_clip
    context.engine.update(context.optimizer, context.scaler, trained_parameters(context), clip)


def _resident(context: RunContext) -> Resident:
    parameters, layers = list(context.module.parameters()), low_rank_layers(context.module).values()
    copies = [t for layer in layers if layer.autocast_copies for t in layer.autocast_copies.tensors]
    trained = [local(p).nbytes for p in parameters if p.requires_grad]
    return Resident(
        trained=sum(trained),
        frozen=sum(local(p).nbytes for p in [*parameters, *copies] if not p.requires_grad),
        buffers=sum(b.nbytes for b in context.module.buffers()),
        state=sum(local(t).nbytes for t in resident_tensors(context.optimizer)),
        largest=max(trained),
    )


def trace_event(
    workload: Workload,
    phase: Phase,
    rule: RankRule | None,
    *,
    processes: int,
    held: bool,
    trained: bool = False,
    on_gpu: bool = False,
) -> float:
    """Most bytes of one process during the event at the beginning of ``phase``; replicated matrices.

    The SVDs are distributed over ``processes``; as many results are alive at once. ``held``: the old parameters are
    kept until the end, as ``DistributedDataParallel`` keeps them. Bases are ``trained`` or frozen before an update.
    ``on_gpu``: second moments of dense layers are in the host's memory until they are used.
    """
    with fake_world(0, processes) as world, fake_tensors(), fake_collectives():
        update = phase.event == "update"
        r = {name: phase.before.get(name, r) for name, r in phase.r.items()} if update else {}
        context = traced_context(workload, SingleEngine(world), batch=1, r=r, rule=rule, trained=trained)
        run = ScriptedRun(context)
        # With made-up values all bases would be repaired, which a real first update does not do.
        run.method.config.orthogonality_bound = math.inf
        for parameter in trained_parameters(run.context):
            parameter.grad = torch.empty_like(parameter)
        # The optimizer makes its state.
        _update(run.context)
        held_parameters = list(run.context.module.parameters()) if held else []
        del parameter
        if on_gpu and not update:
            run.expect("conversion")  # the tracer counts what is made or used after this
        tracer = Tracer(resident_tensors(run.context.module, run.context.optimizer), counted=True)
        with tracer:
            run.update() if update else run.convert()
        del held_parameters
        return float(max(tracer.trace.live))
