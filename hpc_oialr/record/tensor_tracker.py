"""Counts the bytes of tensors as they are made and die, without the profiler."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorTracker(TorchDispatchMode):
    """The highest number of bytes that tensors hold at once, while it is active.

    Sees what every operation returns, not what it needs inside. The profiler sees more, but crashes the
    process now and then while gloo's threads work (torch 2.13), so that it is for one process only.

    Parameters
    ----------
    tensors
        Alive already.

    Attributes
    ----------
    peak_bytes
        Highest so far.

    Notes
    -----
    After each operation all live storages are added up, since FSDP2 frees and fills its own by resizing:
    some microseconds per thousand of them.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._live: dict[int, weakref.ref[Any]] = {}
        for tensor in tensors:
            self._watch(tensor)
        self._add_up()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._watch(leaf)
        self._add_up()
        return result

    def _watch(self, tensor: Tensor) -> None:
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        key = storage._cdata
        if key not in self._live:
            self._live[key] = weakref.ref(storage, lambda _: self._live.pop(key, None))

    def _add_up(self) -> None:
        alive = [storage() for storage in list(self._live.values())]
        total = sum(storage.nbytes() for storage in alive if storage is not None)
        self.peak_bytes = max(self.peak_bytes, total)
