"""Optimizer state by parameter name: independent of order, of process, of engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from hpc_oialr.errors import CheckpointError

PLAIN = (bool, int, float, str, type(None))


def collect(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state's tensors as ``NAME.KEY``, and all the rest as plain values for JSON.

    Returns
    -------
    Tensors, and ``{"groups": [...], "values": {NAME: {KEY: value}}}`` with each group's options and names.
    """
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{names[parameter]}.{key}"] = value
            else:
                values.setdefault(names[parameter], {})[key] = value
    return tensors, {"groups": [_group(group, names) for group in optimizer.param_groups], "values": values}


def _group(group: dict[str, Any], names: Mapping[Tensor, str]) -> dict[str, Any]:
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in group.items()}
    plain = {key: value for key, value in options.items() if key != "params" and _is_plain(value)}
    return {"names": [names[p] for p in group["params"]], "options": plain}


def _is_plain(value: Any) -> bool:
    return all(isinstance(item, PLAIN) for item in (value if isinstance(value, list) else [value]))


def empty_like(model: nn.Module, held: Mapping[str, tuple[torch.Size, torch.dtype]]) -> dict[str, Tensor]:
    """Tensors for a checkpoint to fill: state of a parameter's shape as that is stored, the rest on the CPU."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    tensors = {}
    for name, (shape, dtype) in held.items():
        parameter = parameters.get(name.rpartition(".")[0])
        if isinstance(parameter, DTensor) and parameter.shape == shape:
            tensors[name] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        else:
            tensors[name] = torch.empty(shape, dtype=dtype)
    return tensors


def restore(
    model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> None:
    """Put back what :func:`collect` gave, into an optimizer made anew over the same parameters.

    Raises
    ------
    CheckpointError
        If the groups hold other parameters.
    """
    names = {p: name for name, p in model.named_parameters()}
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    stored = [name for group in rest["groups"] for name in group["names"]]
    if order != stored:
        first = next((a, b) for a, b in zip([*order, "none"], [*stored, "none"], strict=False) if a != b)
        raise CheckpointError(
            f"the optimizer's parameters are not the checkpoint's: {first[0]} here, {first[1]} there; "
            "resume with the settings of the run's config.yaml."
        )
    index = {name: i for i, name in enumerate(order)}
    state: dict[int, dict[str, Any]] = {index[name]: dict(values) for name, values in rest["values"].items()}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition(".")
        state.setdefault(index[parameter], {})[key] = tensor
    fresh = optimizer.state_dict()
    groups = [
        _options(old, new["options"]) for old, new in zip(fresh["param_groups"], rest["groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _options(group: dict[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """``group`` with the stored options; JSON has no tuples."""
    return group | {key: tuple(v) if isinstance(group.get(key), tuple) else v for key, v in stored.items()}
