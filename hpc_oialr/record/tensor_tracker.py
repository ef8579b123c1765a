"""Counts the bytes of tensors as they are made and die, without the profiler."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hpc_oialr.torch_compat import TorchDispatchMode, tree_leaves


class TensorTracker(TorchDispatchMode):
    """The highest number of bytes that tensors hold at once, while it is active.

    Sees what every operation returns, not what it needs inside. What an operation is given and none has
    returned counts from then on; if it outlives the tracker, like DDP's buckets, it was there all along. The
    profiler sees more, but crashes the process now and then while gloo's threads work (torch 2.13), so that
    it is for one process only.

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
        self._found: list[tuple[int, weakref.ref[Any]]] = []  # with the highest number of bytes before it
        for tensor in tensors:
            self._watch(tensor)
        self._add_up()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count what it is given and returns."""
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and self._watch(leaf):
                self._found.append((self.peak_bytes, weakref.ref(_storage(leaf))))
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._watch(leaf)
        self._add_up()
        return result

    def __exit__(self, *error: Any) -> None:
        """Add what outlives the tracker to what was alive before it was found."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        outlived = 0
        for before, found in reversed(self._found):
            storage = found()
            outlived += 0 if storage is None else storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, before + outlived)

    @property
    def live_bytes(self) -> int:
        """What is alive now."""
        alive = [storage() for storage in list(self._live.values())]
        return sum(storage.nbytes() for storage in alive if storage is not None)

    def _watch(self, tensor: Tensor) -> bool:
        """Whether its storage is new here."""
        storage = _storage(tensor)
        key = storage._cdata
        if key in self._live:
            return False
        self._live[key] = weakref.ref(storage, lambda _: self._live.pop(key, None))
        return True

    def _add_up(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return getattr(tensor, "_local_tensor", tensor).untyped_storage()
