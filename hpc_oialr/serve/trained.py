"""A run's checkpoint as a model, with what it takes to give it inputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from hpc_oialr.data import Batch
from hpc_oialr.distributed import World
from hpc_oialr.errors import CheckpointError
from hpc_oialr.lowrank import Selection, low_rank_layers, select, untied_state
from hpc_oialr.lowrank.conversion import empty_factors, leave_fused_inference
from hpc_oialr.lowrank.kernel_modes import as_inner
from hpc_oialr.method.basis import reorthogonalise
from hpc_oialr.train.checkpoint_store import CheckpointStore
from hpc_oialr.train.config import RunConfig
from hpc_oialr.train.load_config import load_config


@dataclass(frozen=True)
class Trained:
    """A model on the CPU, in evaluation mode, and where it comes from; low-rank layers are low-rank."""

    run: Path
    step: int
    config: RunConfig
    model: nn.Module
    example: dict[str, tuple[list[int], str]]  # shape and dtype of every tensor of a small batch

    def inputs(self, samples: int) -> Batch:
        """Random inputs that the model may be given, always the same; of the task's :meth:`served` names."""
        generator = torch.Generator().manual_seed(0)
        batch: Batch = {}
        for name in self.config.task.served(cast(Batch, self.example)):
            shape, dtype = self.example[name]
            size, kind = (samples, *shape[1:]), getattr(torch, dtype)
            if kind.is_floating_point:
                # The model itself is in fp32, also of a run in bf16.
                wide = torch.float64 if self.config.train.precision == "float64" else torch.float32
                kind = wide
            if name.endswith("mask"):
                batch[name] = torch.ones(size, dtype=kind)
            elif kind.is_floating_point:
                batch[name] = torch.randn(size, generator=generator).to(kind)
            else:
                tokens = self.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
                batch[name] = torch.randint(0, tokens, size, generator=generator).to(kind)
        return batch

    @torch.no_grad()
    def answer(self, model: nn.Module, inputs: Batch) -> Tensor:
        """What ``model``, in whichever form, answers."""
        return self.config.task.predict(model, inputs)


def checkpoint_of(path: Path, step: int | None = None) -> tuple[Path, int]:
    """Run and step of a run's folder, by default its last intact checkpoint, or of a checkpoint's folder.

    Raises CheckpointError if there is no such checkpoint, or it is damaged.
    """
    if step is None and path.parent.name == "checkpoints" and (number := path.name.removeprefix("step_")).isdigit():
        path, step = path.parent.parent, int(number)
    if not (path / "config.yaml").exists():
        raise CheckpointError(f"{path} holds no run: there is no {path / 'config.yaml'}.")
    return path, _choose(CheckpointStore(path / "checkpoints", World.single("cpu")), step)


def load_trained(run: Path, *, step: int | None = None) -> Trained:
    """The model of a run's checkpoint; needs no data. Errors as for :func:`checkpoint_of`."""
    run, step = checkpoint_of(run, step)
    store = CheckpointStore(run / "checkpoints", World.single("cpu"))
    state, config = store.read_state(step), load_config(run / "config.yaml").config
    example = {key: torch.zeros(shape, dtype=getattr(torch, dtype)) for key, (shape, dtype) in state["example"].items()}
    model = config.model.build(example)
    model.to(torch.float64 if config.train.precision == "float64" else torch.float32)
    ranks = {name: as_inner(r) for name, r in state["controller"]["r"].items()}
    leave_fused_inference(model)
    method = config.oialr
    factor_dtype = getattr(torch, method.factor_dtype) if method and method.factor_dtype else None
    for target in select(model, method.selection if method else Selection()) if ranks else ():
        if target.name in ranks:
            empty_factors(target, ranks[target.name], factor_dtype=factor_dtype)
    with torch.no_grad():
        store.read_into(step, {f"model.{name}": tensor for name, tensor in untied_state(model).items()})
    layers = low_rank_layers(model)
    for layer in (layers[name] for name in state["controller"].get("bases_trained", ())):
        U, S, Vh = (factor.detach() for factor in layer.factors)
        layer.set_factors(*reorthogonalise(U, S, Vh))
    return Trained(run, step, config, model.eval(), state["example"])


def load_model(run: Path, *, step: int | None = None) -> nn.Module:
    """The model of :func:`load_trained`."""
    return load_trained(run, step=step).model


def _choose(store: CheckpointStore, step: int | None) -> int:
    if step is None:
        step = store.latest()
        if step is None:
            raise CheckpointError(f"{store.folder} holds no checkpoint yet; train longer, or set checkpoint.every.")
        return step
    if step not in store.steps():
        held = ", ".join(map(str, store.steps())) or "none"
        raise CheckpointError(f"{store.folder} holds no checkpoint of step {step}; there are: {held}.")
    if damage := store.damage(step):
        raise CheckpointError(f"{store.path(step)} is damaged ({damage}); choose another --step.")
    return step
