"""A run's model in a folder, in the form that its next user reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hpc_oialr.data import Batch
from hpc_oialr.errors import ConfigError, ModelError
from hpc_oialr.finetune import SARA, merge_adapters
from hpc_oialr.lowrank import fold, low_rank_layers, merge
from hpc_oialr.models import PretrainedClassifier
from hpc_oialr.outputs import new_folder
from hpc_oialr.serve.card import write_card
from hpc_oialr.serve.factored import build_plan, load_factored, save_config, save_factored, save_tensors
from hpc_oialr.serve.lora import differences, load_adapter, load_base, require_peft, sara_factors, save_adapter
from hpc_oialr.serve.programs import require_onnx, save_onnx, save_pt2
from hpc_oialr.serve.trained import Trained, checkpoint_of, load_trained
from hpc_oialr.train.load_config import load_config

Form = Literal["dense", "lowrank", "factored", "pt2", "onnx", "lora", "hub"]
FORMS: tuple[Form, ...] = ("dense", "lowrank", "factored", "pt2", "onnx", "lora", "hub")
DESCRIPTION = "export.json"
# Outputs that differ by more, in the largest absolute value over the largest output, are no rounding (fp32).
LARGEST_DIFFERENCE = 1e-3
# How many samples are compared: another number than the programs were traced with.
SAMPLES = 3


@dataclass(frozen=True)
class Options:
    """What some forms need to know."""

    weights: Literal["factored", "dense"] = "factored"  # of pt2 and onnx
    base: Path | None = None  # of lora: a folder that transformers loads; SARA's is its pretrained model
    r: int | None = None  # of lora; None: exact


def export(
    run: Path,
    form: Form,
    *,
    out: Path | None = None,
    step: int | None = None,
    force: bool = False,
    options: Options | None = None,
) -> Path:
    """Write a checkpoint's model, by default the last, into ``RUN/export/FORM`` or ``out``.

    - "dense": ``model.safetensors`` with the original names and, for a transformers model, ``config.json``, so that its
      class's ``from_pretrained`` loads the folder.
    - "lowrank": factors as ``NAME.U``, ``NAME.S``, ``NAME.Vh``, and ``lowrank.json`` with r and the shape of every layer.
    - "factored": two factors a layer, for :func:`hpc_oialr.load_factored`.
    - "pt2": ``model.pt2`` for ``torch.export.load``; "onnx": ``model.onnx``. Inputs in the order of ``export.json``.
    - "lora": a PEFT adapter of the difference to ``options.base``; of a SARA run by default its own factors.
    - "hub": dense and factored weights with a model card, as a repository of the Hugging Face Hub is laid out.

    Adapted layers of :mod:`hpc_oialr.finetune` are merged but for "lora" and factored programs; Mo-SARA's cannot be.

    What was written is read back but for "dense" and "lowrank", and compared with the trained model on random inputs.

    Returns
    -------
    The folder; its ``export.json`` says of which step it is, how far outputs differ, and what else is to be known.

    Raises
    ------
    CheckpointError
        If the run has no such checkpoint, or it is damaged.
    OutputError
        If the folder holds what no export wrote (see :func:`hpc_oialr.outputs.new_folder`).
    ModelError
        If the model cannot be written in this form, or what was written gives other outputs.
    MissingExtraError
        Without the packages of the form.
    """
    options = options or Options()
    if form == "lora" and options.base is None and not _is_sara(run, step):
        raise ConfigError("base", None, "must name the model that the adapter belongs to", fix="Add --base FOLDER.")
    if form in _NEEDED:
        _NEEDED[form]()
    target = out or run / "export" / form
    inputs = [run, *([options.base] if options.base else [])]
    with new_folder(target, "oialr export", inputs=inputs, force=force) as folder:
        trained = load_trained(run, step=step)
        if form != "lora" and not (form in ("pt2", "onnx") and options.weights == "factored"):
            trained = replace(trained, model=merge_adapters(trained.model, inplace=True))
        content: dict[str, Any] = {"form": form, "run": trained.run.name, "step": trained.step}
        if note := getattr(trained.model, "export_note", None):
            content["note"] = note
        if form in ("dense", "lowrank"):
            _WRITERS[form](trained, folder, options, content)
        else:
            batch = trained.inputs(SAMPLES)
            expected = trained.answer(trained.model, batch)
            content["inputs"] = {
                name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in batch.items()
            }
            written = _WRITERS[form](trained, folder, options, content)
            assert written is not None
            content["difference"] = _difference(written(batch), expected, form, content)
        if form == "hub":
            write_card(trained, folder, content["difference"])
        (folder / DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return target


def _difference(found: Tensor, expected: Tensor, form: str, content: dict[str, Any]) -> dict[str, Any]:
    """How far outputs differ; ModelError if that is no rounding, unless an adapter was cut."""
    largest = float(expected.abs().max())
    absolute = float((found - expected).abs().max())
    relative = absolute / largest if largest else absolute
    if not relative <= LARGEST_DIFFERENCE and not content.get("truncation_error"):
        raise ModelError(
            f"the {form} export gives other outputs than the trained model: they differ by {absolute:.3g}, of at most "
            f"{largest:.3g}. Nothing was written; export another form, such as --format dense."
        )
    return {"absolute": absolute, "relative": relative, "largest_output": largest, "samples": len(expected)}


Writer = Callable[[Trained, Path, Options, dict[str, Any]], Callable[[Batch], Tensor] | None]


def _dense(trained: Trained, folder: Path, options: Options, content: dict[str, Any]) -> None:
    model = merge(trained.model, inplace=True)
    save_tensors(model, folder / "model.safetensors")
    save_config(model, folder)


def _lowrank(trained: Trained, folder: Path, options: Options, content: dict[str, Any]) -> None:
    layers = low_rank_layers(trained.model).items()
    described = {name: {"r": layer.inner, "shape": list(layer.dense_shape)} for name, layer in layers}
    weight = "U @ S @ Vh, reshaped to shape; where r is a pair, r_out and r_in, U @ S @ kron(Vh, identity)"
    text = {"weight": weight, "layers": described, **build_plan(trained)}
    (folder / "lowrank.json").write_text(json.dumps(text, indent=2), encoding="utf-8")
    save_tensors(trained.model, folder / "model.safetensors")
    save_config(trained.model, folder)


def _factored(trained: Trained, folder: Path, options: Options, content: dict[str, Any]) -> Callable[[Batch], Tensor]:
    save_factored(trained, fold(trained.model), folder)
    own = build_plan(trained)["library"] is None  # a class that only its user can build
    loaded = load_factored(folder, merge(trained.model) if own else None)
    return lambda batch: trained.answer(loaded, batch)


def _program(save: Callable[[Trained, nn.Module, Path], Callable[[Batch], Tensor]]) -> Writer:
    def write(trained: Trained, folder: Path, options: Options, content: dict[str, Any]) -> Callable[[Batch], Tensor]:
        content["weights"] = options.weights
        with torch.no_grad():
            model = fold(trained.model) if options.weights == "factored" else merge(trained.model)
            return save(trained, model.requires_grad_(False), folder)

    return write


def _is_sara(run: Path, step: int | None) -> bool:
    model = load_config(checkpoint_of(run, step)[0] / "config.yaml").config.model
    return isinstance(model, PretrainedClassifier) and isinstance(model.method, SARA)


def _lora(trained: Trained, folder: Path, options: Options, content: dict[str, Any]) -> Callable[[Batch], Tensor]:
    tuned, settings = merge(merge_adapters(trained.model)), trained.config.model
    if options.base is not None:
        fresh: Callable[[], nn.Module] = partial(load_base, options.base)
        origin = options.base
        found = differences(fresh(), tuned, options.r)
    else:
        assert isinstance(settings, PretrainedClassifier)
        # The head is new, and saved whole.
        origin, fresh = settings.folder(), lambda: settings.pretrained()[0].eval()
        found = sara_factors(trained.model, settings.pretrained()[1])
    save_adapter(fresh(), tuned, found, folder, str(origin))
    factors, whole = found
    content |= {
        "base": str(origin),
        "r": {name: each.r for name, each in factors.items()},
        "truncation_error": max(each.error for each in factors.values()) if options.r else 0.0,
        "saved_whole": whole,
    }
    loaded = load_adapter(fresh(), folder)
    return lambda batch: trained.answer(loaded, batch)


def _hub(trained: Trained, folder: Path, options: Options, content: dict[str, Any]) -> Callable[[Batch], Tensor]:
    answer = _factored(trained, folder, options, content)
    _dense(
        Trained(trained.run, trained.step, trained.config, merge(trained.model), trained.example), folder, options, {}
    )
    return answer


# Packages of a form, which are there before any work is done.
_NEEDED: dict[str, Callable[[], Any]] = {"onnx": require_onnx, "lora": require_peft}
_WRITERS: dict[str, Writer] = {
    "dense": _dense,
    "lowrank": _lowrank,
    "factored": _factored,
    "pt2": _program(save_pt2),
    "onnx": _program(save_onnx),
    "lora": _lora,
    "hub": _hub,
}
