"""Peak memory of a run's tensors, in bytes: exact on GPUs by their allocator, on CPUs by probing steps."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from hpc_oialr import torch_compat
from hpc_oialr.lowrank import low_rank_layers
from hpc_oialr.lowrank.layout import local
from hpc_oialr.record.tensor_tracker import TensorTracker
from hpc_oialr.streams import without_lines

Subject = nn.Module | torch.optim.Optimizer | Tensor
Change = tuple[int, int]  # (nanoseconds since the epoch, bytes)

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
    subjects
        Gives the models, optimizers and other tensors that live between steps; called when a probe
        begins, since a model's wrapper may have been replaced.
    device
        Where the run computes.
    processes
        Of the run: with more than one a :class:`TensorTracker` takes the profiler's place.

    Notes
    -----
    A probe takes some 10 us per operation on top of the step; the first one about a second more, in
    which the profiler is loaded. Memory inside libraries (oneDNN, LAPACK) is not counted, as on GPUs.
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
            self._probed = max(self._probed, tracker.peak_bytes + min(unseen, bucket_bytes(*subjects)))
            return
        subjects = tuple(self._subjects())
        before = resident_bytes(*subjects)
        deaths, watched = _watch_deaths(resident_tensors(*subjects))
        # Holding on to a wrapper would keep alive what the probe is to see dying.
        del subjects
        with (
            without_lines(_CHATTER),
            # torch 2.11 warns without acc_events, though there is one cycle only.
            profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler,
        ):
            yield
        del watched
        changes = sorted([*deaths, *_allocations(profiler)])
        self._probed = max(self._probed, before + highest_sum(change for _, change in changes))


def _watch_deaths(tensors: Iterable[Tensor]) -> tuple[list[Change], list[weakref.ref[Any]]]:
    """Changes to come from tensors older than the probe, of which the profiler does not know the size."""
    deaths: list[Change] = []

    def on_death(size: int) -> Callable[[Any], None]:
        return lambda _: deaths.append((time.time_ns(), -size))

    storages = _storages(tensors).values()
    return deaths, [weakref.ref(storage, on_death(storage.nbytes())) for storage in storages]


def _allocations(profiler: profile) -> list[Change]:
    """(time, bytes) of allocations, and of the deaths of what was allocated under the profiler.

    Other deaths are left out: the allocator's table may hold a stale size for them, from an earlier probe.
    """
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    events = sorted(_walk(results.experimental_event_tree()))
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
        if torch_compat.is_allocation(kind):
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


def resident_tensors(*subjects: Subject) -> Iterator[Tensor]:
    """What lives between steps: parameters, buffers, gradients, optimizers' state, copies for autocast."""
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


def resident_bytes(*subjects: Subject) -> int:
    """Bytes of :func:`resident_tensors`, each storage counted once, and of DDP's gradient buckets.

    Parameters
    ----------
    subjects
        Models, wrapped or not, optimizers, and single tensors.
    """
    storages = _storages(resident_tensors(*subjects)).values()
    return sum(storage.nbytes() for storage in storages) + bucket_bytes(*subjects)


def bucket_bytes(*subjects: Subject) -> int:
    """Bytes of DDP's gradient buckets that no gradient shows."""
    wrapped = [subject for subject in subjects if isinstance(subject, DistributedDataParallel)]
    return sum(_bucket_bytes(subject) for subject in wrapped)


def _bucket_bytes(model: DistributedDataParallel) -> int:
    """Buckets that no gradient shows; 0 before they are rebuilt in the second step, within sight of a probe."""
    if not torch_compat.has_final_buckets(model):
        return 0
    trained = [p for p in model.parameters() if p.requires_grad]
    seen = _storages(p.grad for p in trained if p.grad is not None and model.gradient_as_bucket_view)
    return max(0, sum(p.nbytes for p in trained) - sum(storage.nbytes() for storage in seen.values()))


def peak_rss_bytes() -> int:
    """Highest resident set size of this process so far, as the operating system counts it (bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    storages = (local(tensor).untyped_storage() for tensor in tensors)
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
