"""A model for inference in a folder: its low-rank layers as two factors, and how to build the rest."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hpc_oialr import models
from hpc_oialr.errors import CheckpointError, ModelError
from hpc_oialr.lowrank import match_structure, untied_state
from hpc_oialr.lowrank.folded import empty_folded, folded_layers
from hpc_oialr.models.base import prepare_transformers
from hpc_oialr.serve.trained import Trained
from hpc_oialr.system_errors import read_json

TENSORS, DESCRIPTION = "factored.safetensors", "factored.json"


def save_tensors(model: nn.Module, path: Path) -> None:
    """The state dict as safetensors, tied weights once."""
    tensors = {name: t.detach().contiguous() for name, t in untied_state(model).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def save_config(model: Any, folder: Path) -> None:
    """``config.json`` of a transformers model; nothing of another one."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "save_pretrained"):
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)


def save_factored(trained: Trained, folded: nn.Module, folder: Path) -> None:
    """Write ``factored.safetensors``, ``factored.json`` and, of a transformers model, ``config.json``."""
    save_tensors(folded, folder / TENSORS)
    save_config(folded, folder)
    layers = {name: layer.r for name, layer in folded_layers(folded).items()}
    content = {"format": 1, "layers": layers, **build_plan(trained)}
    (folder / DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def build_plan(trained: Trained) -> dict[str, Any]:
    """How :func:`load_factored` builds the dense model: by transformers, by this package, or not at all."""
    model, settings = trained.model, trained.config.model
    name = type(model).__name__
    if type(model).__module__.startswith("transformers.") and not model._forward_pre_hooks:
        return {"library": "transformers", "model": name}
    if getattr(models, type(settings).__name__, None) is type(settings):
        arguments = dataclasses.asdict(cast(Any, settings))
        built_by = {"model": type(settings).__name__, "settings": arguments, "example": trained.example}
        return {"library": "hpc_oialr", **built_by}
    return {"library": None, "model": name}


def load_factored(
    folder: Path | str, model: nn.Module | None = None, *, device: torch.device | str = "cpu"
) -> nn.Module:
    """A model that ``oialr export --format factored``, ``lowrank`` or ``hub`` wrote, in evaluation mode.

    Needs neither the run's folder nor its recipe, and no optimizer. From "factored" and "hub" every low-rank layer
    comes as two thin products, for inference; from "lowrank" as it was trained, and training may go on.

    Parameters
    ----------
    folder
        The export's folder.
    model
        A dense model of the same class and sizes, which is changed in place; needed only if the class is neither of
        transformers nor of this package.
    device
        Where the model is afterwards.

    Raises
    ------
    CheckpointError
        If the folder holds no such export, or its tensors are not those of the model.
    ModelError
        If the model cannot be built here: give it as ``model``.
    """
    folder = Path(folder)
    trained = (folder / "lowrank.json").exists() and not (folder / DESCRIPTION).exists()
    description, tensors = (
        (folder / "lowrank.json", folder / "model.safetensors") if trained else (folder / DESCRIPTION, folder / TENSORS)
    )
    if not (description.exists() and tensors.exists()):
        raise CheckpointError(f"{folder} holds no {TENSORS}; write it with oialr export RUN --format factored.")
    plan: dict[str, Any] = read_json(description)
    state = load_file(tensors)
    model = _build(plan, folder) if model is None else model
    dtype = next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)
    model.to(dtype)
    if trained:
        match_structure(model, state)
    else:
        empty_folded(model, plan["layers"])
    _load(model, state, tensors)
    return model.to(device).eval()


def _build(plan: Mapping[str, Any], folder: Path) -> nn.Module:
    """The dense model, without a trace in torch's random numbers."""
    name, library = str(plan.get("model")), plan.get("library")
    with torch.random.fork_rng(devices=[]):
        if library == "hpc_oialr" and name in models.__all__:
            example = {
                key: torch.zeros(shape, dtype=getattr(torch, dtype)) for key, (shape, dtype) in plan["example"].items()
            }
            built: nn.Module = getattr(models, name)(**plan["settings"]).build(example)
            return built
        if library == "transformers":
            prepare_transformers()
            import transformers

            kind = getattr(transformers, name, None)
            if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
                stock: nn.Module = kind(transformers.AutoConfig.from_pretrained(folder))
                return stock
            raise ModelError(f"transformers {transformers.__version__} has no model {name!r}; {folder} needs it.")
    raise ModelError(
        f"{folder} holds a {name}, which is a class of neither transformers nor hpc_oialr; give a dense one: "
        "load_factored(folder, model)."
    )


def _load(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    missing, unexpected = model.load_state_dict(dict(state), strict=False)
    tied = set(model.state_dict()) - set(untied_state(model))
    if wrong := [*unexpected, *(name for name in missing if name not in tied)]:
        there = "holds" if wrong[0] in unexpected else "lacks"
        raise CheckpointError(f"{path} {there} {wrong[0]}; it is not of this {type(model).__name__}.")
