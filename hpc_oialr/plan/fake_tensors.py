"""Tensors without data: real shapes, dtypes and lifetimes; made-up values where code reads them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hpc_oialr.method import loading
from hpc_oialr.torch_compat import FakeTensorMode, TorchDispatchMode


@contextmanager
def replaced(*patches: tuple[Any, str, Any]) -> Iterator[None]:
    """Context in which attributes have other values: (owner, name, value)."""
    before = [getattr(owner, name) for owner, name, _ in patches]
    for owner, name, value in patches:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(patches, before, strict=True):
            setattr(owner, name, value)


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Context in which no tensor has data.

    A value that code reads says that all is well: ``all`` gives True, every other flag False; integers are 0,
    other numbers 1. Code that depends on values in another way comes out wrong.
    """
    from transformers.utils import import_utils

    # transformers makes masks for fake tensors that attention does not need, and the controller misses loaded values.
    patches = replaced(
        (import_utils, "is_fake_tensor", lambda _: False), (loading, "require_values", lambda _: None)
    )
    with FakeTensorMode(allow_non_fake_inputs=True), _MadeUpValues(), patches, warnings.catch_warnings():  # type: ignore[no-untyped-call]
        # Cached casts of bases are looked up by their address; fake ones all have address 0.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield


class _MadeUpValues(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            tensor = args[0]
            if tensor.dtype == torch.bool:
                return getattr(tensor, "all_is_well", False)
            return 1.0 if tensor.is_floating_point() else 0
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.all, torch.ops.aten._is_all_true):
            result.all_is_well = True
        return result
