"""A model as a program without its Python code: torch.export's ``.pt2``, and ONNX."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpc_oialr.data import Batch
from hpc_oialr.errors import MissingExtraError, ModelError
from hpc_oialr.serve.trained import Trained
from hpc_oialr.train.tasks import Task

Answer = Callable[[Batch], Tensor]


class Program(nn.Module):
    """A model as a function of tensors: those of ``names``, in their order, to one answer."""

    def __init__(self, model: nn.Module, task: Task, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.task, self.names = model, task, names

    def forward(self, *tensors: Tensor) -> Tensor:
        """The task's answer."""
        return self.task.predict(self.model, dict(zip(self.names, tensors, strict=True)))


def save_pt2(trained: Trained, model: nn.Module, folder: Path) -> Answer:
    """Write ``model.pt2``; returns the loaded program. Any number of samples, and of tokens up to the trained length."""
    program, inputs = _program(trained, model)
    with _quietly("torch.export", model):
        exported = torch.export.export(program, tuple(inputs.values()), dynamic_shapes=_sizes(inputs), strict=False)
        torch.export.save(exported, folder / "model.pt2")
    loaded = torch.export.load(folder / "model.pt2").module()
    return lambda batch: loaded(*(batch[name] for name in program.names))


def save_onnx(trained: Trained, model: nn.Module, folder: Path) -> Answer:
    """Write ``model.onnx``, large weights beside it; returns it as ONNX Runtime computes it.

    Sizes of inputs as for :func:`save_pt2`. MissingExtraError without onnx, onnxscript and onnxruntime.
    """
    onnxruntime = require_onnx()
    program, inputs = _program(trained, model)
    with _quietly("torch.onnx.export", model):
        exported = torch.onnx.export(
            program,
            tuple(inputs.values()),
            dynamic_shapes=_sizes(inputs),
            input_names=list(program.names),
            output_names=["answer"],
            dynamo=True,
            verbose=False,
        )
        assert exported is not None
        exported.save(folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    # An input on which the answer does not depend is none of the graph's.
    needed = [node.name for node in session.get_inputs()]

    def answer(batch: Batch) -> Tensor:
        return torch.from_numpy(session.run(None, {name: batch[name].numpy() for name in needed})[0])

    return answer


def require_onnx() -> Any:
    """ONNX Runtime; MissingExtraError without it, or without what torch.onnx needs."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("onnx, onnxscript and onnxruntime", "onnx", purpose="--format onnx") from error
    return onnxruntime


def _program(trained: Trained, model: nn.Module) -> tuple[Program, Batch]:
    # Two samples: a size of one would be taken as a constant.
    inputs = trained.inputs(2)
    return Program(model, trained.config.task, tuple(inputs)).eval(), inputs


def _sizes(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Which sizes may differ: samples everywhere, and of tokens how many of them."""
    samples = torch.export.Dim("samples")

    def of(tensor: Tensor) -> dict[int, Any]:
        if tensor.dim() == 2 and not tensor.is_floating_point():
            return {0: samples, 1: torch.export.Dim("tokens", min=2, max=tensor.shape[1])}
        return {0: samples}

    return {"tensors": tuple(of(tensor) for tensor in inputs.values())}


@contextmanager
def _quietly(exporter: str, model: nn.Module) -> Iterator[None]:
    """Without the exporter's advice; ModelError if it cannot export the model."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        cause = next((line for line in str(first).splitlines() if line.strip()), type(first).__name__)
        raise ModelError(
            f"{exporter} cannot export {type(model).__name__} ({cause.strip()[:200]}). Export it --format factored, and "
            "load it by hpc_oialr.load_factored."
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
