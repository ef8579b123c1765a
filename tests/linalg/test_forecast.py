"""The memory that is forecast against what the kernel counts, on two processes."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from support.peak_memory import peak_bytes
from support.spawn import spawn

from hpc_oialr.linalg.distributed_svd import distributed_svd, forecast_bytes
from hpc_oialr.linalg.layout import Layout
from hpc_oialr.linalg.methods import Gather, Hierarchical, Method, Randomized, Tsqr

SHAPES = ((24000, 256), (256, 16000))
METHODS: tuple[Method, ...] = (
    Tsqr(),
    Gather(),
    Hierarchical(r=30),
    Hierarchical(tolerance=0.5),
    Randomized(r=30),
)
# Buffers of gloo and BLAS, which the kernel counts and the forecast does not.
LIBRARIES = 8 << 20


def peaks(rank: int, size: int) -> list[int]:
    """Of every shape and method."""
    dist.init_process_group("gloo", rank=rank, world_size=size)
    found = []
    for m, n in SHAPES:
        A = torch.randn(m, n).tensor_split(size)[rank].clone()
        for method in METHODS:
            run = lambda A=A, method=method: distributed_svd(A, dist.group.WORLD, method=method)  # noqa: E731
            # What the kernel counts besides, of gloo's threads and of earlier runs, only adds.
            found.append(min(peak_bytes(run) for _ in range(3)))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_stays_within_the_forecast() -> None:
    cases = [(m, n, method) for m, n in SHAPES for method in METHODS]
    for (m, n, method), *found in zip(cases, *spawn(peaks, 2), strict=True):
        forecast = forecast_bytes(method, Layout((m // 2, m // 2), n), torch.float32)
        allowed = 1.1 * forecast + LIBRARIES
        assert 0.25 * forecast < max(found) < allowed, (m, n, method, max(found), forecast)
