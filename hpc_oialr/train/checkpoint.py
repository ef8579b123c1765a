"""What a checkpoint contains: the whole state of a run, saved and loaded bit for bit.

Model, optimizer, method and random generators are tensors under ``model.``, ``optimizer.``, ``oialr.`` and ``rng.``,
the rest is ``state.json``; :mod:`hpc_oialr.train.checkpoint_store` writes both. Optimizer state is stored by parameter
name, independent of order, rank and engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from hpc_oialr.distributed import World
from hpc_oialr.errors import CheckpointError
from hpc_oialr.train.async_checkpoint import AsyncCheckpoints
from hpc_oialr.train.checkpoint_store import CheckpointStore
from hpc_oialr.train.run_context import RunContext, seed_process
from hpc_oialr.train.same_run import require_same_data, require_same_model, require_settings, stored
from hpc_oialr.train.timing import Timers

# Options of an optimizer that say how a device computes its step: a run may go on on another one.
_OF_DEVICE = ("fused", "foreach", "capturable")


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0  # steps done; the order of the data is a function of it
    best_metric: float | None = None
    test_at_best: dict[str, float] = field(default_factory=dict)  # test metrics there, if the settings ask for them
    waited: int = 0  # evaluations in a row without a better metric
    last: dict[str, Any] = field(default_factory=dict)  # the last evaluation's metrics
    peak_memory_gib: float = 0.0  # largest so far, runs before a resume included
    checkpoint_s: float = 0.0  # time of the longest checkpoint before this one


def save(
    store: CheckpointStore | AsyncCheckpoints,
    context: RunContext,
    progress: Progress,
    timers: Timers,
    settings: Mapping[str, Any],
) -> None:
    """Write a checkpoint, or begin to; a collective call.

    Wrapper and buffers are left as in a resumed run, so that both continue with the same bits, as far as the device
    allows: on GPUs DDP reorders its buckets in the step after it was made.
    """
    world, engine, module = context.world, context.engine, context.module
    context.share_buffers()
    engine.gather_state(module, context.optimizer)
    of_optimizer, optimizer_rest = optimizer_state(module, context.optimizer)
    generators = {f"{world.rank}.cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        generators[f"{world.rank}.cuda"] = torch.cuda.get_rng_state(world.device)
    tensors = {
        f"{prefix}.{name}": tensor.detach()
        for prefix, named in (
            ("model", engine.model_tensors(module)),
            ("optimizer", of_optimizer),
            ("oialr", context.controller.tensor_state()),
            ("rng", generators),
        )
        for name, tensor in named.items()
    }
    state = {
        "version": 1,
        "progress": vars(progress),
        "world_size": world.size,
        "seed": context.config.train.seed,
        "settings": stored(settings),
        "samples": _samples(context),
        "model": context.identity,
        "example": context.example,
        "controller": context.controller.state_dict(),
        "optimizer": optimizer_rest,
        "rates": context.rates.state_dict(),
        "scaler": context.scaler.state_dict(),
        "clocks": timers.state_dict(),
    }
    store.save(progress.step, tensors, state)
    context.controller.rewrap()


def load(
    store: CheckpointStore, step: int, context: RunContext, timers: Timers, settings: Mapping[str, Any]
) -> Progress:
    """Load the checkpoint of ``step`` into a new run; returns its progress.

    CheckpointError if it is of a run with other settings, other data, or another model; ModelError if its low-rank
    layers are not among those the settings select.
    """
    state, where = store.read_state(step), str(store.path(step))
    require_settings(state, settings, where)
    require_same_data(state, _samples(context), where)
    require_same_model(context.identity, state["model"], where)
    module, optimizer = context.module, context.optimizer
    context.controller.load_state_dict(state["controller"], store.read(step, "oialr."))
    with torch.no_grad():
        store.read_into(step, context.engine.model_tensors(module), "model.")
    # Each rank reads its shards: moments are sharded as their parameters are.
    tensors = _empty_state(module, store.metadata(step, "optimizer."))
    store.read_into(step, tensors, "optimizer.")
    load_optimizer(module, optimizer, tensors, state["optimizer"])
    context.engine.scatter_state(module, optimizer)
    context.rates.load_state_dict(state["rates"])
    context.scaler.load_state_dict(state["scaler"])
    timers.load_state_dict(state["clocks"])
    same_size = state["world_size"] == context.world.size
    if not (same_size and _restore_generators(store.read(step, "rng."), context.world)):
        seed_process(context.config.train.seed, step, context.world.rank)
    return Progress(**state["progress"])


def _samples(context: RunContext) -> dict[str, int]:
    splits = context.splits
    parts = {"training": splits.train, "validation": splits.validation, "test": splits.test}
    return {name: len(part) for name, part in parts.items() if part is not None}


def _restore_generators(states: Mapping[str, Tensor], world: World) -> bool:
    """Returns False if this rank's generators were not stored."""
    cpu, cuda = f"{world.rank}.cpu", f"{world.rank}.cuda"
    if cpu not in states or (world.device.type == "cuda" and cuda not in states):
        return False
    torch.set_rng_state(states[cpu])
    if world.device.type == "cuda":
        torch.cuda.set_rng_state(states[cuda], world.device)
    return True


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state's tensors as ``NAME.KEY``, and the rest as plain values for JSON.

    The rest is ``{"groups": [...], "values": {NAME: {KEY: value}}}``, with each group's options and names.
    """
    plain = (bool, int, float, str, type(None))
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{names[parameter]}.{key}"] = value
            else:
                values.setdefault(names[parameter], {})[key] = value
    groups = []
    for group in optimizer.param_groups:
        options = {}
        for key, value in group.items():
            items = value if isinstance(value, list | tuple) else [value]
            if key != "params" and all(isinstance(item, plain) for item in items):
                options[key] = list(value) if isinstance(value, tuple) else value
        groups.append({"names": [names[p] for p in group["params"]], "options": options})
    return tensors, {"groups": groups, "values": values}


def _empty_state(model: nn.Module, kinds: Mapping[str, tuple[torch.Size, torch.dtype]]) -> dict[str, Tensor]:
    """Empty tensors to read into: state of a parameter's shape is sharded like the parameter, the rest on the CPU."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    tensors = {}
    for name, (shape, dtype) in kinds.items():
        parameter = parameters.get(name.rpartition(".")[0])
        if isinstance(parameter, DTensor) and parameter.shape == shape:
            tensors[name] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        else:
            tensors[name] = torch.empty(shape, dtype=dtype)
    return tensors


def load_optimizer(
    model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> None:
    """Load :func:`optimizer_state` into a new optimizer; CheckpointError if its groups hold other parameters."""
    names = {p: name for name, p in model.named_parameters()}
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    then = [name for group in rest["groups"] for name in group["names"]]
    if order != then:
        first = next((a, b) for a, b in zip([*order, "none"], [*then, "none"], strict=False) if a != b)
        raise CheckpointError(
            f"the optimizer's parameters are not the checkpoint's: {first[0]} here, {first[1]} there; "
            "resume with the settings of the run's config.yaml."
        )
    index = {name: i for i, name in enumerate(order)}
    state: dict[int, dict[str, Any]] = {index[name]: dict(values) for name, values in rest["values"].items()}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition(".")
        state.setdefault(index[parameter], {})[key] = tensor
    # JSON has no tuples.
    groups = [
        group
        | {
            k: tuple(v) if isinstance(group.get(k), tuple) else v
            for k, v in saved["options"].items()
            if k not in _OF_DEVICE
        }
        for group, saved in zip(optimizer.state_dict()["param_groups"], rest["groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
