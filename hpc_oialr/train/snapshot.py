"""A run's whole state, to a checkpoint and back, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hpc_oialr.train import optimizer_state
from hpc_oialr.train.checkpoint_store import CheckpointStore
from hpc_oialr.train.fingerprint import require_same
from hpc_oialr.train.run_context import RunContext
from hpc_oialr.train.same_run import require_same_data, require_settings, stored
from hpc_oialr.train.seeds import generator_state, restore_generators, seed_process
from hpc_oialr.train.timers import Timers


@dataclass
class Progress:
    """Where a run stands.

    Attributes
    ----------
    step
        Steps done; also the position in the data, whose order is a function of it.
    best_metric
        Best evaluation so far.
    waited
        Evaluations in a row without a better metric.
    last
        The last evaluation's metrics.
    peak_memory_gib
        Largest so far, runs before a resume included.
    checkpoint_s
        What the longest checkpoint before this one took (s).
    """

    step: int = 0
    best_metric: float | None = None
    waited: int = 0
    last: dict[str, Any] = field(default_factory=dict)
    peak_memory_gib: float = 0.0
    checkpoint_s: float = 0.0


def save(
    store: CheckpointStore,
    context: RunContext,
    progress: Progress,
    timers: Timers,
    settings: Mapping[str, Any],
) -> None:
    """Write a checkpoint with the settings it is of; a collective call.

    Wrapper and buffers are left as a resumed run finds them, so that both go on with the same bits, as far as
    the device allows: on GPUs DDP orders its buckets anew in the step after it was made.
    """
    share_buffers(context)
    context.engine.gather_state(context.module, context.optimizer)
    named, rest = optimizer_state.collect(context.module, context.optimizer)
    tensors: dict[str, Tensor] = {
        f"model.{name}": t for name, t in context.engine.model_tensors(context.module).items()
    }
    tensors |= {f"optimizer.{name}": t for name, t in named.items()}
    tensors |= {f"oialr.{name}": t for name, t in context.controller.tensor_state().items()}
    tensors |= {
        f"rng.{name}": t for name, t in generator_state(context.world.rank, context.world.device).items()
    }
    state = {
        "version": 1,
        "progress": vars(progress),
        "world_size": context.world.size,
        "seed": context.config.train.seed,
        "settings": stored(settings),
        "samples": _samples(context),
        "model": context.identity,
        "example": context.example,
        "controller": context.controller.state_dict(),
        "optimizer": rest,
        "rates": context.rates.state_dict(),
        "scaler": context.scaler.state_dict(),
        "clocks": timers.state_dict(),
    }
    store.save(progress.step, {name: t.detach() for name, t in tensors.items()}, state)
    context.controller.rewrap()


def _samples(context: RunContext) -> dict[str, int]:
    splits = context.splits
    parts = {"training": splits.train, "validation": splits.validation, "test": splits.test}
    return {name: len(part) for name, part in parts.items() if part is not None}


def load(
    store: CheckpointStore, step: int, context: RunContext, timers: Timers, settings: Mapping[str, Any]
) -> Progress:
    """Put the checkpoint of ``step`` into a fresh run; where the run stands then.

    Raises
    ------
    CheckpointError
        If the checkpoint is of a run with other settings, on other data, or of another model.
    ModelError
        If its low-rank layers are not among the settings' ones.
    """
    state = store.read_state(step)
    where = str(store.path(step))
    require_settings(state, settings, where)
    require_same_data(state, _samples(context), where)
    require_same(context.identity, state["model"], where)
    context.controller.load_state_dict(state["controller"], store.read(step, "oialr."))
    with torch.no_grad():
        here = context.engine.model_tensors(context.module)
        store.read_into(step, {f"model.{name}": t for name, t in here.items()})
    _restore_optimizer(store, step, context, state["optimizer"])
    context.engine.scatter_state(context.module, context.optimizer)
    context.rates.load_state_dict(state["rates"])
    context.scaler.load_state_dict(state["scaler"])
    timers.load_state_dict(state["clocks"])
    _restore_random(context, store.read(step, "rng."), state, step)
    return Progress(**state["progress"])


def _restore_optimizer(
    store: CheckpointStore, step: int, context: RunContext, rest: Mapping[str, Any]
) -> None:
    """Each process reads what it stores: moments are split as their parameters are."""
    prefix = "optimizer."
    held = {k.removeprefix(prefix): v for k, v in store.metadata(step).items() if k.startswith(prefix)}
    tensors = optimizer_state.empty_like(context.module, held)
    store.read_into(step, {f"{prefix}{name}": t for name, t in tensors.items()})
    optimizer_state.restore(context.module, context.optimizer, tensors, rest)


def _restore_random(
    context: RunContext, states: Mapping[str, Tensor], state: Mapping[str, Any], step: int
) -> None:
    """The stored generators for the same number of processes; streams of their own otherwise."""
    world, seed = context.world, context.config.train.seed
    same = state["world_size"] == world.size
    if not (same and restore_generators(states, world.rank, world.device)):
        seed_process(seed, step, world.rank)


@torch.no_grad()
def share_buffers(context: RunContext) -> None:
    """Process 0's buffers on every process, as ``DistributedDataParallel`` does before each forward."""
    context.world.share(context.module.buffers())
