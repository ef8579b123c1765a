"""Is this the same model, and are these the same weights?"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hpc_oialr.errors import CheckpointError
from hpc_oialr.lowrank.layout import whole


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Class, and name, shape and dtype of every parameter and buffer of a dense model; fit for JSON."""
    tensors = {name: [list(t.shape), str(t.dtype)] for name, t in model.state_dict().items()}
    return {"class": type(model).__name__, "tensors": tensors}


def require_same(here: dict[str, Any], stored: dict[str, Any], where: str) -> None:
    """Raise :class:`CheckpointError` that names the first difference."""
    difference = _difference(here, stored)
    if difference:
        raise CheckpointError(
            f"{where} is of another model: {difference}. Resume with the model settings of the run's config.yaml."
        )


def _difference(here: dict[str, Any], stored: dict[str, Any]) -> str | None:
    if here["class"] != stored["class"]:
        return f"class {stored['class']} there, {here['class']} here"
    ours, theirs = here["tensors"], stored["tensors"]
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            return f"{name} is {_describe(theirs.get(name))} there, {_describe(ours.get(name))} here"
    return None


def _describe(tensor: list[Any] | None) -> str:
    return "missing" if tensor is None else f"{' x '.join(map(str, tensor[0])) or 'a scalar'} {tensor[1]}"


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Digest of names, shapes, dtypes and bits; a collective call, whole tensors are gathered one by one."""
    digest = hashlib.sha256()
    for name, stored in sorted(tensors.items()):
        tensor = whole(stored)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
