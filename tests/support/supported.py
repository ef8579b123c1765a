"""How each optimizer of the registry is made for a test."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torch import nn

from hpc_oialr import muon_adamw

# Options without which an optimizer does not start, or does nothing within a few steps.
OPTIONS: dict[str, dict[str, Any]] = {
    "torch.ASGD": {"lr": 0.1, "lambd": 1e-4, "t0": 0},
    "torch.Adadelta": {"lr": 1.0},
    "torch.LBFGS": {"lr": 0.1, "max_iter": 2},
    "torch.RMSprop": {"lr": 1e-3, "momentum": 0.9, "centered": True},
    "torch.SGD": {"lr": 0.05, "momentum": 0.9},
    "transformers.Adafactor": {"lr": 1e-2, "relative_step": False, "scale_parameter": False},
    "timm.RMSpropTF": {"lr": 1e-3, "momentum": 0.9, "centered": True},
    "pytorch_optimizer.AccSGD": {"lr": 0.01},
    "pytorch_optimizer.Ranger": {"lr": 1e-2, "k": 2},
}
MATRICES_ONLY = ("torch.Muon",)
CLOSURE = (
    "torch.LBFGS",
    *(f"schedulefree.{name}ScheduleFreeClosure" for name in ("AdamW", "RAdam", "SGD")),
)


def missing(name: str) -> str | None:
    """Why an optimizer cannot be tried here, or None."""
    package = name.partition(".")[0]
    if package == "bitsandbytes":
        return "needs a GPU"
    try:
        return None if find_spec(package) and find_class(name) else f"{package} is not installed"
    except ImportError as error:
        return f"{package} cannot be imported: {error}"


def make_optimizer(name: str, model: nn.Module) -> Any:
    """The optimizer ``"package.Class"`` for all parameters of a model, or for its matrices."""
    if name == "hpc_oialr.MuonAdamW":
        return muon_adamw(model, lr=0.02)
    parameters = [p for p in model.parameters() if p.dim() == 2 or name not in MATRICES_ONLY]
    options = OPTIONS.get(name, {"lr": 1e-2})
    return find_class(name)(parameters, **options)


def find_class(name: str) -> Callable[..., Any]:
    """The class, wherever its package keeps it."""
    package, _, kind = name.partition(".")
    module = {
        "torch": "torch.optim",
        "transformers": "transformers.optimization",
        "timm": "timm.optim",
    }.get(package, package)
    found: Callable[..., Any] = getattr(importlib.import_module(module), kind)
    return found
