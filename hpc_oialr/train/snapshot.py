"""A run's whole state, to a checkpoint and back, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hpc_oialr.train import optimizer_state
from hpc_oialr.train.checkpoint_store import CheckpointStore
from hpc_oialr.train.clocks import Clocks
from hpc_oialr.train.fingerprint import require_same
from hpc_oialr.train.same_run import require_same_data, require_settings, stored
from hpc_oialr.train.seeds import generator_state, restore_generators, seed_process
from hpc_oialr.train.session import Session


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
    session: Session,
    progress: Progress,
    clocks: Clocks,
    settings: Mapping[str, Any],
) -> None:
    """Write a checkpoint with the settings it is of; a collective call.

    Wrapper and buffers are left as a resumed run finds them, so that both go on with the same bits, as far as
    the device allows: on GPUs DDP orders its buckets anew in the step after it was made.
    """
    share_buffers(session)
    session.engine.gather_state(session.module, session.optimizer)
    named, rest = optimizer_state.collect(session.module, session.optimizer)
    tensors: dict[str, Tensor] = {
        f"model.{name}": t for name, t in session.engine.model_tensors(session.module).items()
    }
    tensors |= {f"optimizer.{name}": t for name, t in named.items()}
    tensors |= {f"oialr.{name}": t for name, t in session.controller.tensor_state().items()}
    tensors |= {
        f"rng.{name}": t for name, t in generator_state(session.world.rank, session.world.device).items()
    }
    state = {
        "version": 1,
        "progress": vars(progress),
        "world_size": session.world.size,
        "seed": session.config.train.seed,
        "settings": stored(settings),
        "samples": _samples(session),
        "model": session.identity,
        "example": session.example,
        "controller": session.controller.state_dict(),
        "optimizer": rest,
        "rates": session.rates.state_dict(),
        "scaler": session.scaler.state_dict(),
        "clocks": clocks.state_dict(),
    }
    store.save(progress.step, {name: t.detach() for name, t in tensors.items()}, state)
    session.controller.rewrap()


def _samples(session: Session) -> dict[str, int]:
    splits = session.splits
    parts = {"training": splits.train, "validation": splits.validation, "test": splits.test}
    return {name: len(part) for name, part in parts.items() if part is not None}


def load(
    store: CheckpointStore, step: int, session: Session, clocks: Clocks, settings: Mapping[str, Any]
) -> Progress:
    """Put the checkpoint of ``step`` into a fresh session; where the run stands then.

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
    require_same_data(state, _samples(session), where)
    require_same(session.identity, state["model"], where)
    session.controller.load_state_dict(state["controller"], store.read(step, "oialr."))
    with torch.no_grad():
        here = session.engine.model_tensors(session.module)
        store.read_into(step, {f"model.{name}": t for name, t in here.items()})
    _restore_optimizer(store, step, session, state["optimizer"])
    session.engine.scatter_state(session.module, session.optimizer)
    session.rates.load_state_dict(state["rates"])
    session.scaler.load_state_dict(state["scaler"])
    clocks.load_state_dict(state["clocks"])
    _restore_random(session, store.read(step, "rng."), state, step)
    return Progress(**state["progress"])


def _restore_optimizer(store: CheckpointStore, step: int, session: Session, rest: Mapping[str, Any]) -> None:
    """Each process reads what it stores: moments are split as their parameters are."""
    prefix = "optimizer."
    held = {k.removeprefix(prefix): v for k, v in store.metadata(step).items() if k.startswith(prefix)}
    tensors = optimizer_state.empty_like(session.module, held)
    store.read_into(step, {f"{prefix}{name}": t for name, t in tensors.items()})
    optimizer_state.restore(session.module, session.optimizer, tensors, rest)


def _restore_random(
    session: Session, states: Mapping[str, Tensor], state: Mapping[str, Any], step: int
) -> None:
    """The stored generators for the same number of processes; streams of their own otherwise."""
    world, seed = session.world, session.config.train.seed
    same = state["world_size"] == world.size
    if not (same and restore_generators(states, world.rank, world.device)):
        seed_process(seed, step, world.rank)


@torch.no_grad()
def share_buffers(session: Session) -> None:
    """Process 0's buffers on every process, as ``DistributedDataParallel`` does before each forward."""
    session.world.share(session.module.buffers())
