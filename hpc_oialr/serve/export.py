"""A run's model as safetensors: dense, for the stock class, or with its factors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn

from hpc_oialr.distributed import World
from hpc_oialr.errors import CheckpointError
from hpc_oialr.lowrank import Selection, low_rank_layers, merge, select, untied_state
from hpc_oialr.lowrank.conversion import empty_factors, leave_fused_inference
from hpc_oialr.method.basis import reorthogonalise
from hpc_oialr.outputs import new_folder
from hpc_oialr.train.checkpoint_store import CheckpointStore
from hpc_oialr.train.load_config import load_config


def export(
    run: Path,
    form: Literal["dense", "lowrank"],
    *,
    out: Path | None = None,
    step: int | None = None,
    force: bool = False,
) -> Path:
    """Write a checkpoint's model, by default the last, into ``RUN/export/dense`` or ``RUN/export/lowrank``, or ``out``.

    "dense": ``model.safetensors`` with the original names and, for a transformers model, ``config.json``, so that its
    class's ``from_pretrained`` loads the folder. "lowrank": factors as ``NAME.U``, ``NAME.S``, ``NAME.Vh``, and
    ``lowrank.json`` with r and the shape of every layer. Raises CheckpointError if the run has no such checkpoint or
    it is damaged, OutputError if the folder holds what no export wrote (see :func:`hpc_oialr.outputs.new_folder`).
    """
    target = out or run / "export" / form
    with new_folder(target, "oialr export", inputs=[run], force=force) as folder:
        model = load_model(run, step=step)
        if form == "lowrank":
            layers = low_rank_layers(model).items()
            described = {name: {"r": layer.r, "shape": list(layer.dense_shape)} for name, layer in layers}
            content = {"weight": "U @ S @ Vh, reshaped to shape", "layers": described}
            (folder / "lowrank.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
        else:
            model = merge(model, inplace=True)
        tensors = {name: t.detach().contiguous() for name, t in untied_state(model).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config: Any = getattr(model, "config", None)
        if hasattr(config, "save_pretrained"):
            config.architectures = [type(model).__name__]
            config.save_pretrained(folder)
    return target


def checkpoint_of(path: Path, step: int | None = None) -> tuple[Path, int]:
    """Run and step of a run's folder, by default its last intact checkpoint, or of a checkpoint's folder.

    Raises CheckpointError if there is no such checkpoint, or it is damaged.
    """
    if step is None and path.parent.name == "checkpoints" and (number := path.name.removeprefix("step_")).isdigit():
        path, step = path.parent.parent, int(number)
    if not (path / "config.yaml").exists():
        raise CheckpointError(f"{path} holds no run: there is no {path / 'config.yaml'}.")
    return path, _choose(CheckpointStore(path / "checkpoints", World.single("cpu")), step)


def load_model(run: Path, *, step: int | None = None) -> nn.Module:
    """The model of a run's checkpoint, on the CPU, in evaluation mode; low-rank layers stay low-rank. Needs no data."""
    run, step = checkpoint_of(run, step)
    store = CheckpointStore(run / "checkpoints", World.single("cpu"))
    state, config = store.read_state(step), load_config(run / "config.yaml").config
    example = {key: torch.zeros(shape, dtype=getattr(torch, dtype)) for key, (shape, dtype) in state["example"].items()}
    model = config.model.build(example)
    model.to(torch.float64 if config.train.precision == "float64" else torch.float32)
    ranks: dict[str, int] = state["controller"]["r"]
    leave_fused_inference(model)
    method = config.oialr
    factor_dtype = getattr(torch, method.factor_dtype) if method and method.factor_dtype else None
    for target in select(model, method.selection if method else Selection()):
        if target.name in ranks:
            empty_factors(target, ranks[target.name], factor_dtype=factor_dtype)
    with torch.no_grad():
        store.read_into(step, {f"model.{name}": tensor for name, tensor in untied_state(model).items()})
    layers = low_rank_layers(model)
    for layer in (layers[name] for name in state["controller"].get("bases_trained", ())):
        U, S, Vh = (factor.detach() for factor in layer.factors)
        layer.set_factors(*reorthogonalise(U, S, Vh))
    return model.eval()


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
