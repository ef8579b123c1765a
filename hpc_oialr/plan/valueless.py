"""Tensors without data: shapes, dtypes and lifetimes are true, values are made up where code reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hpc_oialr.method import loading
from hpc_oialr.torch_compat import FakeTensorMode, TorchDispatchMode


@contextmanager
def valueless_tensors() -> Iterator[None]:
    """Context in which no tensor has data.

    Where code reads a value all is as it should be (``all`` gives True, every other flag is False); whole numbers
    are 0, others 1. What depends on values in another way than these comes out wrong.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _MadeUpValues(), _taken_for_real():  # type: ignore[no-untyped-call]
        yield


@contextmanager
def _taken_for_real() -> Iterator[None]:
    """Let others do as with ordinary tensors.

    On others transformers makes masks that attention does not need, and the controller misses loaded values.
    """
    from transformers.utils import import_utils

    before, values = import_utils.is_fake_tensor, loading.require_values
    import_utils.is_fake_tensor = lambda _: False
    loading.require_values = lambda bases: None
    try:
        yield
    finally:
        import_utils.is_fake_tensor = before
        loading.require_values = values


class _MadeUpValues(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return _made_up(args[0])
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.all, torch.ops.aten._is_all_true):
            result.all_is_well = True
        return result


def _made_up(tensor: Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return getattr(tensor, "all_is_well", False)
    return 1.0 if tensor.is_floating_point() else 0
