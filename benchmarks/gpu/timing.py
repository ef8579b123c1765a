"""Times of calls: CUDA events around graph replays, several calls in turn, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from hpc_oialr.train.cuda_graph import CaptureError, capture

# Called with the number of an input set, 0 <= i < sets.
Call = Callable[[int], object]

# A sample shorter than this is mostly the resolution of the clock (CUDA events: 0.5 us) and launch jitter.
SAMPLE_MS = 2.0
SAMPLES = (5, 50)
# A round that takes longer than this is repeated twice only.
LONG_MS = 500.0


@dataclass(frozen=True)
class Timing:
    """Time of one call.

    Attributes
    ----------
    ms
        Median over the samples (ms).
    spread
        Distance of the 10th and 90th percentile over the median; a difference smaller than that is noise.
    method
        "graph", "eager", or "eager: " and why no graph could be captured.
    """

    ms: float
    spread: float
    method: str


@dataclass(frozen=True)
class _Prepared:
    run: Callable[[], object]
    calls: int
    method: str


def interleaved(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    sets: int = 1,
    graphs: bool = True,
    in_a_row: int = 1,
    seconds: float = 0.4,
) -> dict[str, Timing]:
    """Time of each call, all measured in turn, so that drifts of the clock rate meet all of them.

    Parameters
    ----------
    calls
        Functions of the number of an input set.
    sets
        How many input sets there are; together they should be larger than the L2 cache.
    graphs
        Replay a CUDA graph of all sets instead of launching kernels one by one.
    in_a_row
        Least calls of a sample: with more than one the host may run ahead, as it does in training.
    seconds
        Time to spend on all calls together, at least five samples each, two of long ones.
    """
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" and graphs else None
    prepared = {name: _prepare(call, device, sets, pool) for name, call in calls.items()}
    once = {name: _sample(p.run, 1, device) for name, p in prepared.items()}
    repeats = {name: max(in_a_row, round(SAMPLE_MS / max(ms, 1e-3))) for name, ms in once.items()}
    round_ms = sum(repeats[name] * ms for name, ms in once.items())
    least = SAMPLES[0] if round_ms < LONG_MS else 2
    rounds = min(SAMPLES[1], max(least, int(1e3 * seconds / max(round_ms, 1e-3))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, p in prepared.items():
            samples[name].append(_sample(p.run, repeats[name], device) / p.calls)
    return {name: _timing(values, prepared[name].method) for name, values in samples.items()}


def timed(call: Callable[[], object], device: torch.device, *, in_a_row: int = 1, seconds: float = 1.0) -> Timing:
    """Time of one call by itself, launched kernel by kernel."""
    calls = {"": lambda _: call()}
    return interleaved(calls, device, graphs=False, in_a_row=in_a_row, seconds=seconds)[""]


def _timing(values: list[float], method: str) -> Timing:
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    median = statistics.median(values)
    return Timing(median, (deciles[-1] - deciles[0]) / median, method)


def _sample(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Milliseconds of one run, the mean of ``repeats`` in a row."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return 1e3 * (time.perf_counter() - start) / repeats
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / repeats


def _prepare(call: Call, device: torch.device, sets: int, pool: object | None) -> _Prepared:
    def all_sets() -> None:
        for i in range(sets):
            call(i)

    if pool is None:
        all_sets()
        synchronise(device)
        return _Prepared(all_sets, sets, "eager")
    replay, method = captured(all_sets, device, pool=pool)
    replay()
    synchronise(device)
    return _Prepared(replay, sets, method)


def captured(
    call: Callable[[], object], device: torch.device, *, pool: object | None = None, warmup: int = 3
) -> tuple[Callable[[], object], str]:
    """The call as a CUDA graph's replay; the call itself, and the reason, where it cannot be captured.

    Memory of the graph is kept as long as the replay function is.
    """
    if device.type != "cuda":
        call()
        return call, "eager: a CUDA graph needs a GPU"
    # Compilers, library handles and the allocator's first requests have no place in a capture.
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(warmup):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    try:
        return capture(call, device, pool=pool)[0], "graph"
    except CaptureError as error:
        return call, f"eager: {error}"


def synchronise(device: torch.device) -> None:
    """Wait for the GPU, if that is where the work is."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
