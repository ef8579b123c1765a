"""What a call launches, waits for and holds: kernels, host synchronisations, peak memory."""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

SYNC_WARNING = "called a synchronizing CUDA operation"


class Kernels(NamedTuple):
    """What one call launches: how many kernels, and milliseconds by name of those that take the most (none on a CPU)."""

    count: int
    ms: dict[str, float]


def kernels(call: Callable[[], object], device: torch.device, *, most: int = 16) -> Kernels:
    """CUDA kernels of one call, copies and fills not counted; on a CPU the calls of ATen operators."""
    if device.type != "cuda":
        with _OperatorCounter() as counter:
            call()
        return Kernels(int(counter.operators), {})
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
        torch.cuda.synchronize(device)
    found, ms = [event for event in profiler.events() or () if _is_kernel(event)], Counter[str]()
    for event in found:
        ms[event.name[:100]] += event.time_range.elapsed_us() / 1e3
    return Kernels(len(found), {name: round(value, 3) for name, value in ms.most_common(most)})


def _is_kernel(event: Any) -> bool:
    # Optimizer.step and the profiler put ranges of their own on the GPU's timeline.
    annotation = getattr(event, "is_user_annotation", False) or event.name.startswith(("Optimizer.", "Profiler"))
    moved = event.name.startswith(("Memcpy", "Memset"))
    return event.device_type == DeviceType.CUDA and not (annotation or moved)


class Synchronisations:
    """How often the host waited for the GPU, and where.

    Attributes
    ----------
    count
        On a GPU, the warnings of ``torch.cuda.set_sync_debug_mode``; on a CPU, the read-backs of single values.
    places
        Up to five "file:line" with their counts, most frequent first; only on a GPU.
    """

    def __init__(self) -> None:
        self.count = 0
        self.places: dict[str, int] = {}


@contextmanager
def synchronisations(device: torch.device) -> Iterator[Synchronisations]:
    """Count what happens inside; the result is complete at the end."""
    found = Synchronisations()
    if device.type != "cuda":
        with _OperatorCounter() as counter:
            yield found
        found.count = counter.read_backs
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    places = Counter(
        f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in caught if SYNC_WARNING in str(w.message)
    )
    found.count, found.places = places.total(), dict(places.most_common(5))


class _OperatorCounter(TorchDispatchMode):
    """Calls of operators, and those that hand a tensor's value to Python."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators = self.read_backs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        self.read_backs += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def operations(call: Callable[[], object]) -> int:
    """Floating-point operations of the products and attentions of one call, two for a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def start_peak(device: torch.device) -> float | None:
    """Free what is unused, begin a new peak, and return what is still held (GiB); None on a CPU."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device) / 2**30


def peak_gib(device: torch.device) -> float | None:
    """The most that tensors held since :func:`start_peak` (GiB); None on a CPU, where nobody counts."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
