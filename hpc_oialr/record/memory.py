"""Peak memory of a run's tensors, in bytes: exact on GPUs by their allocator, on CPUs by probing steps."""

from __future__ import annotations

import contextlib
import itertools
import resource
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.nn.parallel import DistributedDataParallel

from hpc_oialr import torch_compat
from hpc_oialr.lowrank import low_rank_layers
from hpc_oialr.lowrank.layout import local
from hpc_oialr.streams import without_lines
from hpc_oialr.torch_compat import TorchDispatchMode, tree_leaves

Subject = nn.Module | torch.optim.Optimizer | Tensor
Change = tuple[int, int]  # (nanoseconds since the epoch, bytes)

# Printed by the profiler when it starts and stops, and when a tensor dies that is older than it (which the probe counts).
_CHATTER = (b"profiler_start", b"profiler_stop", b"Memory block of unknown size")


class MemoryMeter:
    """The highest number of bytes that tensors held at once.

    On a GPU the allocator counts, and :meth:`probe` costs nothing. On a CPU a probed step runs under the profiler, which
    sees each allocation, also inside compiled code; with several ``processes`` under a :class:`TensorTracker`. A probe
    adds about 10 us per operation, the first one a second. Memory inside libraries (oneDNN, LAPACK) is not counted.

    ``subjects`` gives the models, optimizers and other tensors that live between steps; it is called when a probe begins,
    since a model's wrapper may have been replaced.
    """

    def __init__(
        self,
        subjects: Callable[[], Iterable[Subject]],
        device: torch.device | str = "cpu",
        *,
        processes: int = 1,
    ) -> None:
        self._subjects, self._device, self._processes = subjects, torch.device(device), processes
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
        if self._processes > 1:
            with TensorTracker(resident_tensors(*self._subjects())) as tracker:
                yield
            # Buckets that no operation has touched, as in a conversion.
            subjects = tuple(self._subjects())
            unseen = max(0, resident_bytes(*subjects) - tracker.live_bytes)
            self._probed = max(self._probed, tracker.peak_bytes + min(unseen, _bucket_bytes(*subjects)))
            return
        subjects = tuple(self._subjects())
        before = resident_bytes(*subjects)
        deaths, watched = _watch_deaths(resident_tensors(*subjects))
        # A reference to a wrapper would keep alive what the probe must see freed.
        del subjects
        # Not torch.profiler's, which makes Python objects of all events first: four times as long as the step itself.
        with without_lines(_CHATTER), profile(use_kineto=True, profile_memory=True) as profiler:
            yield
        del watched
        changes = sorted([*deaths, *_allocations(profiler)])
        highest = max(itertools.accumulate((size for _, size in changes), initial=0))
        self._probed = max(self._probed, before + highest)


def _watch_deaths(tensors: Iterable[Tensor]) -> tuple[list[Change], list[weakref.ref[Any]]]:
    """Records when tensors older than the probe are freed: the profiler does not know their size."""
    deaths: list[Change] = []

    def on_death(size: int) -> Callable[[Any], None]:
        return lambda _: deaths.append((time.time_ns(), -size))

    storages = _storages(tensors).values()
    return deaths, [weakref.ref(storage, on_death(storage.nbytes())) for storage in storages]


def _allocations(profiler: profile) -> Iterator[Change]:
    """(time, bytes) of allocations, and of frees of what was allocated under the profiler.

    Other frees are left out: the allocator's table may have a stale size for them, from an earlier probe.
    """
    assert profiler.kineto_results is not None
    stack: list[Any] = list(profiler.kineto_results.experimental_event_tree())
    found: list[tuple[int, int, int]] = []
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        kind, fields = event.typed
        if torch_compat.is_allocation(kind):
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    live: set[int] = set()
    for moment, address, size in sorted(found):
        if size > 0:
            live.add(address)
        elif address in live:
            live.remove(address)
        else:
            continue
        yield moment, size


class TensorTracker(TorchDispatchMode):
    """The highest number of bytes that tensors hold at once while it is active, without the profiler.

    Sees what every operation returns, not what it needs inside. An input that no operation has returned counts from then
    on; if it outlives the tracker, like DDP's buckets, it was there all along. The profiler sees more, but sometimes
    crashes the process while gloo's threads work (torch 2.13).

    After each operation all live storages are added up (microseconds per thousand), since FSDP2 resizes its own.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live: dict[int, weakref.ref[Any]] = {}
        self._found: list[tuple[int, weakref.ref[Any]]] = []  # with the highest number of bytes before it
        for tensor in tensors:
            self._watch(tensor)
        self.peak_bytes = self.live_bytes

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
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return result

    def __exit__(self, *error: Any) -> None:
        """Add what outlives the tracker to the peak before it was found."""
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


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return getattr(tensor, "_local_tensor", tensor).untyped_storage()


def resident_tensors(*subjects: Subject) -> Iterator[Tensor]:
    """Tensors that live between steps: parameters, buffers, gradients, optimizer state, copies for autocast."""
    for subject in subjects:
        if isinstance(subject, nn.Module):
            for layer in low_rank_layers(subject).values():
                yield from layer.autocast_copies.tensors if layer.autocast_copies is not None else ()
            yield from subject.buffers()
            for parameter in subject.parameters():
                yield parameter
                if parameter.grad is not None:
                    yield parameter.grad
        else:
            yield from _tensors_in(subject if isinstance(subject, Tensor) else subject.state)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(item)


def resident_bytes(*subjects: Subject) -> int:
    """Bytes of :func:`resident_tensors`, each storage counted once, and of DDP's gradient buckets."""
    storages = _storages(resident_tensors(*subjects)).values()
    return sum(storage.nbytes() for storage in storages) + _bucket_bytes(*subjects)


def _bucket_bytes(*subjects: Subject) -> int:
    """DDP's gradient buckets that no gradient shows; 0 before they are rebuilt in the second step, seen by a probe."""
    total = 0
    for model in subjects:
        if isinstance(model, DistributedDataParallel) and torch_compat.has_final_buckets(model):
            trained = [p for p in model.parameters() if p.requires_grad]
            seen = _storages(p.grad for p in trained if p.grad is not None and model.gradient_as_bucket_view)
            total += max(0, sum(p.nbytes for p in trained) - sum(s.nbytes() for s in seen.values()))
    return total


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    storages = (local(tensor).untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage for storage in storages if storage.nbytes()}


def peak_rss_bytes() -> int:
    """Highest resident set size of this process so far, as the operating system counts it (bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
