"""What the card can do: the two ceilings every other figure is judged by."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch

from benchmarks.common import Row
from benchmarks.gpu.runner import Case, Context
from benchmarks.gpu.timing import Timing, captured, interleaved, timed


class Peaks(NamedTuple):
    """Measured ceilings: bytes read and written by copies (TB/s), products of bf16 matrices (TFLOP/s)."""

    tb_per_s: float
    tflop_per_s: float


def cases(context: Context) -> Sequence[Case]:
    """The machine, copies and products, launches."""
    return [
        Case("machine", lambda: [machine(context)]),
        Case("copy", lambda: [copy_row(context)]),
        Case("products", lambda: products(context)),
        Case("launches", lambda: [launches(context)]),
    ]


def machine(context: Context) -> Row:
    """What torch and the driver say about it."""
    row: Row = {"what": "machine", "torch": torch.__version__, "cuda": torch.version.cuda}
    if context.cuda:
        gpu = torch.cuda.get_device_properties(context.device)
        row |= {
            "name": gpu.name,
            "multiprocessors": gpu.multi_processor_count,
            "l2_mib": gpu.L2_cache_size / 2**20,
        }
        row |= {"memory_gib": gpu.total_memory / 2**30, "capability": f"{gpu.major}.{gpu.minor}"}
    return row | _smi()


def _smi() -> Row:
    """Driver, clocks and power as nvidia-smi reads them; nothing is set."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode or not done.stdout.strip():
        return {}
    values = done.stdout.splitlines()[0].split(", ")
    return dict(zip(fields, values, strict=False))


def copy_row(context: Context) -> Row:
    """A large copy within the device's memory."""
    timing, moved = _copy(context.device, context.tiny)
    return {"what": "copy", "tb_per_s": moved / timing.ms / 1e9, "bytes": moved, **_of(timing)}


@lru_cache(maxsize=1)
def _copy(device: torch.device, tiny: bool) -> tuple[Timing, int]:
    source = torch.randn(2**16 if tiny else 2**29, device=device)
    target = torch.empty_like(source)
    timing = timed(lambda: target.copy_(source), device, seconds=0.02 if tiny else 0.3)
    return timing, 2 * source.numel() * source.element_size()


def products(context: Context) -> Iterator[Row]:
    """Square products in every arithmetic a step may use."""
    size = 64 if context.tiny else 8192
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "highest"),
        ("tf32", torch.float32, "high"),
        ("fp32", torch.float32, "highest"),
    ):
        timing = _product(context.device, size, dtype, precision)
        rate = 2 * size**3 / timing.ms / 1e9
        yield {"what": f"product {name}", "tflop_per_s": rate, "size": size, **_of(timing)}


@lru_cache(maxsize=3)
def _product(device: torch.device, size: int, dtype: torch.dtype, precision: str) -> Timing:
    # Random numbers: products of zeros draw less power and run faster.
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with matmul_precision(precision):
        return timed(lambda: torch.mm(a, b, out=out), device, seconds=0.4 if size > 1024 else 0.01)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """``torch.set_float32_matmul_precision`` for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def launches(context: Context) -> Row:
    """Microseconds a kernel that does nothing to speak of, launched one by one and in a graph."""
    x, count = torch.zeros(1, device=context.device), 10 if context.tiny else 1000

    def many(_: int = 0) -> None:
        for _ in range(count):
            x.add_(1)

    eager = timed(many, context.device, seconds=0.05)
    replay, method = captured(many, context.device)
    graph = interleaved({"": lambda _: replay()}, context.device, graphs=False, seconds=0.05)[""]
    return {
        "what": "launch",
        "eager_us": 1e3 * eager.ms / count,
        "graph_us": 1e3 * graph.ms / count,
        "graph": method,
    }


def peaks(device: torch.device, tiny: bool) -> Peaks:
    """Both ceilings, measured once in a process."""
    copied, moved = _copy(device, tiny)
    size = 64 if tiny else 8192
    product = _product(device, size, torch.bfloat16, "highest")
    return Peaks(moved / copied.ms / 1e9, 2 * size**3 / product.ms / 1e9)


def _of(timing: Timing) -> Row:
    return {"ms": timing.ms, "spread": timing.spread}
