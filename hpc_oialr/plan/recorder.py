"""Watches operations on tensors without data: what is alive after each, what they compute, move and send."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from hpc_oialr.lowrank.layout import local
from hpc_oialr.plan.device import Work
from hpc_oialr.torch_compat import CollectiveOp, TorchDispatchMode, collective_ops, sync_ops, tree_leaves

aten = torch.ops.aten

# torch's counter has formulas for the attention of GPUs only.
_FLOPS = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
_COLLECTIVES = {
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
    "broadcast": "broadcast",
}


@dataclass(frozen=True)
class Message:
    """One collective.

    Attributes
    ----------
    collective
        Its kind, as in :data:`hpc_oialr.plan.collectives.ALGORITHMS`.
    size
        Bytes of the whole tensor.
    processes, stride
        How many take part, and how far apart they are in rank.
    """

    collective: str
    size: float
    processes: int
    stride: int = 1


@dataclass
class Record:
    """What was seen.

    Attributes
    ----------
    live
        After each operation the bytes of all tensors made since the beginning.
    gradients
        Those of them that are gradients of parameters, in place.
    flops
        Of matrix products and convolutions, by dtype.
    moved
        Bytes that all other operations read and write.
    messages
        What was sent.
    """

    live: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)
    flops: Counter[str] = field(default_factory=Counter)
    moved: float = 0.0
    messages: list[Message] = field(default_factory=list)

    @property
    def work(self) -> Work:
        """All but what was sent."""
        return Work(dict(self.flops), self.moved, len(self.live))


class Recorder(TorchDispatchMode):
    """Records every operation while it is active.

    Parameters
    ----------
    resident
        Tensors that are there before; not recorded unless ``counted``.
    counted
        See ``resident``.
    resizing
        Whether storages may change their size, as FSDP2's do; takes longer.
    """

    def __init__(
        self, resident: Iterable[Tensor] = (), *, counted: bool = False, resizing: bool = False
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = Record()
        self._resizing = resizing
        self._known: dict[int, weakref.ref[Any]] = {}
        self._sizes: dict[int, int] = {}
        self._of_gradients: set[int] = set()
        self._total = self._gradients = 0
        for tensor in resident:
            self._watch(tensor, None if counted else 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and record it."""
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:
            return result
        given, made = _tensors((args, kwargs)), _tensors(result)
        for tensor in made:
            self._watch(tensor)
        self._count(func, args, kwargs or {}, result, given, made)
        self.record.live.append(self._live_bytes())
        self.record.gradients.append(self._gradients)
        return result

    # -- memory ----------------------------------------------------------------------------------

    def _watch(self, tensor: Tensor, size: int | None = None) -> None:
        storage = local(tensor).untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key))
        self._sizes[key] = storage.nbytes() if size is None else size
        self._total += self._sizes[key]

    def _forget(self, key: int) -> None:
        self._known.pop(key, None)
        size = self._sizes.pop(key, 0)
        self._total -= size
        if key in self._of_gradients:
            self._of_gradients.remove(key)
            self._gradients -= size

    def _live_bytes(self) -> int:
        if not self._resizing:
            return self._total
        storages = [(key, reference()) for key, reference in list(self._known.items())]
        return sum(s.nbytes() for key, s in storages if s is not None and self._sizes[key])

    def note_gradient(self, parameter: Tensor) -> None:
        """A parameter's gradient is in place; fit for ``register_post_accumulate_grad_hook``."""
        assert parameter.grad is not None
        self._watch(parameter.grad)
        storage = local(parameter.grad).untyped_storage()
        if storage._cdata not in self._of_gradients:
            self._of_gradients.add(storage._cdata)
            self._gradients += self._sizes[storage._cdata]

    # -- work ------------------------------------------------------------------------------------

    def _count(
        self, func: Any, args: Any, kwargs: Any, result: Any, given: list[Tensor], made: list[Tensor]
    ) -> None:
        if func in collective_ops:
            if func not in sync_ops:
                self._note_message(func, args, kwargs, result)
        elif func.overloadpacket in _FLOPS:
            flops = _FLOPS[func.overloadpacket](*args, **kwargs, out_val=result)
            self.record.flops[_dtype_name(made[0])] += flops
        elif not func.is_view:
            self.record.moved += sum(local(tensor).nbytes for tensor in (*given, *made))

    def _note_message(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = func.overloadpacket.__name__.strip("_")
        collective = next((kind for key, kind in _COLLECTIVES.items() if name.startswith(key)), None)
        if collective is None:
            return
        size = CollectiveOp.get_comm_tensor_size(func, result, args, kwargs)
        ranks = dist.get_process_group_ranks(CollectiveOp.get_process_group(func, args))
        stride = ranks[1] - ranks[0] if len(ranks) > 1 else 1
        self.record.messages.append(Message(collective, size, len(ranks), stride))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
