"""The machine at hand, measured: by the plan itself in a second, or before by ``python -m benchmarks.comm``."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hpc_oialr.errors import DataError
from hpc_oialr.linalg.work_plan import svd_cost
from hpc_oialr.plan.collectives import Link
from hpc_oialr.plan.device import Device
from hpc_oialr.plan.network import Network
from hpc_oialr.plan.timing import Machine

GIB = 1024**3

# Assumed: share of large products' speed that a model's products reach on CPUs.
CPU_EFFICIENCY = 0.7
CPU_LAUNCH_S = 5e-6
# Assumed where nothing was measured: gloo between processes of one machine.
LOOPBACK = Link(1.5e-4, 1e-9)


def measured_device() -> Device:
    """All cores of this machine: products, memory and SVDs, each measured for a moment."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = measure_compute()
    return _device(found | {"cores": cores, "memory_gib": memory_gib()}, {}, "measured just now")


def measure_compute() -> dict[str, Any]:
    """FLOP/s of products in fp32 and bf16 and of SVDs, bytes/s of additions, with all threads of this process."""
    n = 768
    a, b = torch.randn(n, n), torch.randn(n, n)
    half_a, half_b, matrix = a.bfloat16(), b.bfloat16(), torch.randn(384, 384)
    long = torch.randn(1 << 22)
    out = torch.empty_like(long)
    return {
        "peak": {
            "float32": 2.0 * n**3 / median_s(lambda: a @ b),
            "bfloat16": 2.0 * n**3 / median_s(lambda: half_a @ half_b),
        },
        "bandwidth": 3.0 * long.nbytes / median_s(lambda: torch.add(long, long, out=out)),
        "svd_flops": svd_cost(384, 384) / median_s(lambda: torch.linalg.svd(matrix)),
    }


def median_s(function: Callable[[], object], repeats: int = 5) -> float:
    """Median time of a call (s), after one that does not count."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def memory_gib() -> float:
    """Physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def machine_at_hand(path: str | Path | None = None) -> Machine:
    """This machine, as ``python -m benchmarks.comm --out FILE`` has measured it, or without its network.

    Raises
    ------
    DataError
        If the file is not of that benchmark.
    """
    if path is None:
        device = measured_device()
        network = Network(
            name="gloo",
            origin="assumed",
            source="gloo between processes of one machine; python -m benchmarks.comm measures it",
            inside=LOOPBACK,
            between=LOOPBACK,
        )
        return Machine(device, network)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return machine_of(content, str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path} is no result of python -m benchmarks.comm ({type(error).__name__}: {error}). "
            "Make one: python -m benchmarks.comm --out FILE"
        ) from error


def machine_of(content: dict[str, Any], source: str) -> Machine:
    """The machine of a result file's content."""
    sharing = {int(processes): value for processes, value in content["sharing"].items()}
    device = _device(content["device"], sharing, source)
    backend = content["backend"]
    fits = {
        (fit["collective"], int(fit["processes"])): Link(fit["alpha_s"], fit["beta_s_per_byte"])
        for fit in content["fits"]
        if fit["backend"] == backend
    }
    link = fits[min(fits)]
    return Machine(
        device,
        Network(name=backend, origin="measured", source=source, inside=link, between=link, fits=fits),
    )


def _device(found: dict[str, Any], sharing: dict[int, float], source: str) -> Device:
    return Device(
        name=f"{found['cores']} cores",
        origin="measured",
        source=source,
        memory_gib=found["memory_gib"],
        peak=found["peak"],
        efficiency=CPU_EFFICIENCY,
        bandwidth=found["bandwidth"],
        launch_s=CPU_LAUNCH_S,
        svd_flops=found["svd_flops"],
        inside=LOOPBACK,
        cores=found["cores"],
        sharing=sharing,
    )
