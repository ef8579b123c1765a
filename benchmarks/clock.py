"""Wall and processor seconds of a training, with a GPU's queue emptied before either is read."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Runs while it is told to; evaluations pause it."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.wall, self.cpu = device, 0.0, 0.0
        self._since: tuple[float, float] | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside."""
        self._start()
        yield
        self._stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what happens inside."""
        self._stop()
        yield
        self._start()

    def _start(self) -> None:
        self.finish()
        self._since = (time.perf_counter(), time.process_time())

    def _stop(self) -> None:
        self.finish()
        assert self._since is not None
        self.wall += time.perf_counter() - self._since[0]
        self.cpu += time.process_time() - self._since[1]
        self._since = None

    def finish(self) -> None:
        """Wait for the GPU's queue."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@functools.cache
def load_libraries(device: torch.device) -> None:
    """Products, a QR, an SVD, eigenvectors: a GPU loads its libraries once, which is no run's training time."""
    matrix = torch.eye(256, device=device) + 0.01
    for decompose in (torch.linalg.qr, torch.linalg.svd, torch.linalg.eigh):
        decompose(matrix @ matrix)
    matrix.bfloat16() @ matrix.bfloat16()
