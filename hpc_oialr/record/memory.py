"""Peak memory of a run's tensors, in bytes: exact on GPUs by their allocator, on CPUs by probing steps."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from hpc_oialr.record.quiet import without_lines

# What the profiler says on standard error whenever it starts and stops, and when a tensor dies that is
# older than it; the last is just what the probe accounts for itself.
_CHATTER = (b"profiler_start", b"profiler_stop", b"Memory block of unknown size")


class MemoryMeter:
    """The highest number of bytes that tensors held at once.

    On a GPU the allocator counts all the time, and :meth:`probe` costs nothing. On a CPU nobody counts,
    and what the operating system reports is far from the tensors' size; there a probed step is run
    under the profiler, which sees each allocation, those inside of compiled code too.

    Parameters
    ----------
    resident
        Gives the tensors that live between steps, when a probe begins: :func:`resident_tensors`.
    device
        Where the run computes.

    Notes
    -----
    A probe takes some 10 us per operation on top of the step; the first one about a second more, in
    which the profiler is loaded. Memory inside libraries (oneDNN, LAPACK) is not counted, as on GPUs.
    """

    def __init__(self, resident: Callable[[], Iterable[Tensor]], device: torch.device | str = "cpu") -> None:
        self._resident, self._device = resident, torch.device(device)
        self._probed = 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    @property
    def peak_bytes(self) -> int:
        """The highest so far: of all steps on a GPU, of the probed ones on a CPU."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return self._probed

    @contextlib.contextmanager
    def probe(self) -> Iterator[None]:
        """Measure what happens inside: one step, one update."""
        if self._device.type == "cuda":
            yield
            return
        before = _Residents(self._resident())
        self._probed = max(self._probed, before.bytes)
        with without_lines(_CHATTER), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield
        changes = sorted([*before.deaths, *_allocations(profiler)])
        self._probed = max(self._probed, before.bytes + highest_sum(change for _, change in changes))


@dataclass
class _Residents:
    """Tensors that live when a probe begins; the profiler does not know their size when they die."""

    tensors: Iterable[Tensor]
    deaths: list[tuple[int, int]] = field(default_factory=list)
    bytes: int = 0

    def __post_init__(self) -> None:
        self._watched = []
        for storage in _storages(self.tensors).values():
            size = storage.nbytes()
            self.bytes += size
            self._watched.append(weakref.ref(storage, self._on_death(size)))
        # Holding on to them would keep alive what the probe is to see dying.
        self.tensors = ()

    def _on_death(self, size: int) -> Callable[[Any], None]:
        return lambda _: self.deaths.append((time.time_ns(), -size))


def _allocations(profiler: profile) -> list[tuple[int, int]]:
    """(time, bytes) of allocations, and of the deaths of what was allocated under the profiler.

    Other deaths are left out: the allocator's table may hold a stale size for them, from an earlier probe.
    """
    assert profiler.profiler is not None
    events = sorted(_walk(profiler.profiler.kineto_results.experimental_event_tree()))
    live: set[int] = set()
    changes = []
    for moment, address, size in events:
        if size > 0:
            live.add(address)
        elif address in live:
            live.remove(address)
        else:
            continue
        changes.append((moment, size))
    return changes


def _walk(roots: list[Any]) -> Iterator[tuple[int, int, int]]:
    stack = list(roots)
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        kind, fields = event.typed
        if kind == torch._C._profiler._EventType.Allocation:
            yield event.start_time_ns, fields.ptr, fields.alloc_size


def highest_sum(changes: Iterable[int]) -> int:
    """Highest running sum, 0 at the start included.

    Examples
    --------
    >>> highest_sum([4, -3, 2, 5, -8])
    8
    """
    total = highest = 0
    for change in changes:
        total += change
        highest = max(highest, total)
    return highest


def resident_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Iterator[Tensor]:
    """What lives between steps: parameters, buffers, gradients, the optimizer's state."""
    for tensor in [*model.parameters(), *model.buffers()]:
        yield tensor
        if tensor.grad is not None:
            yield tensor.grad
    if optimizer is not None:
        yield from _tensors_in(optimizer.state)


def resident_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes of :func:`resident_tensors`, each storage counted once, and of DDP's gradient buckets."""
    storages = _storages(resident_tensors(model, optimizer))
    return sum(storage.nbytes() for storage in storages.values())


def peak_rss_bytes() -> int:
    """Highest resident set size of this process so far, as the operating system counts it (bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage for storage in storages if storage.nbytes()}


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)
