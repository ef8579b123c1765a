"""Records every torch operation: bytes alive after it, its FLOPs, the bytes it moves, the messages it sends."""

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
from hpc_oialr.torch_compat import CollectiveOp, TorchDispatchMode, collective_ops, sync_ops, tree_leaves

aten = torch.ops.aten

# torch's counter has formulas for the attention of GPUs only.
_FLOPS = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
_COLLECTIVES = "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"


@dataclass(frozen=True)
class Message:
    """One collective."""

    collective: str  # "all_reduce", "all_gather", "reduce_scatter", "all_to_all" or "broadcast"
    size: float  # bytes of the whole tensor: after an all-gather, before the others
    processes: int
    stride: int = 1  # how far apart they are in rank


@dataclass
class Trace:
    """What was recorded."""

    live: list[float] = field(default_factory=list)  # after each operation, bytes of all tensors made so far
    gradients: list[float] = field(default_factory=list)  # those of ``live`` that are gradients
    flops: Counter[str] = field(default_factory=Counter)  # of matrix products and convolutions, by dtype
    moved: float = 0.0  # bytes that all other operations read and write
    messages: list[Message] = field(default_factory=list)


class Tracer(TorchDispatchMode):
    """Records every operation while it is active.

    ``resident`` tensors exist before; they are not in ``live`` unless ``counted``. ``resizing``: storages may change
    their size, as FSDP2's do; slower.
    """

    def __init__(self, resident: Iterable[Tensor] = (), *, counted: bool = False, resizing: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
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
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.prim.device.default:
            return result
        trace, made = self.trace, _tensors(result)
        for tensor in made:
            self._watch(tensor)
        if func in collective_ops:
            if func not in sync_ops:
                self._note_message(func, args, kwargs, result)
        elif func.overloadpacket in _FLOPS:
            dtype = str(made[0].dtype).removeprefix("torch.")
            trace.flops[dtype] += _FLOPS[func.overloadpacket](*args, **kwargs, out_val=result)
        elif not func.is_view:
            trace.moved += sum(local(tensor).nbytes for tensor in (*_tensors((args, kwargs)), *made))
        trace.live.append(self._live_bytes())
        trace.gradients.append(self._gradients)
        return result

    def note_gradient(self, parameter: Tensor) -> None:
        """Count a parameter's gradient as such; fit for ``register_post_accumulate_grad_hook``."""
        assert parameter.grad is not None
        self._watch(parameter.grad)
        key = local(parameter.grad).untyped_storage()._cdata
        if key not in self._of_gradients:
            self._of_gradients.add(key)
            self._gradients += self._sizes[key]

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

    def _note_message(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        # torch's operators are called allreduce_, all_gather_into_tensor and the like.
        name = func.overloadpacket.__name__.replace("_", "")
        collective = next((kind for kind in _COLLECTIVES if name.startswith(kind.replace("_", ""))), None)
        if collective is None:
            return
        size = CollectiveOp.get_comm_tensor_size(func, result, args, kwargs)
        ranks = dist.get_process_group_ranks(CollectiveOp.get_process_group(func, args))
        stride = ranks[1] - ranks[0] if len(ranks) > 1 else 1
        self.trace.messages.append(Message(collective, size, len(ranks), stride))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
