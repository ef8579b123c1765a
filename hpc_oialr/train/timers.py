"""Timers of a run: training, evaluation and checkpoints apart."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

NAMES = ("wall", "update", "data_wait", "eval", "checkpoint")


class Timers:
    """Seconds of each part of a run; they go on after a resume.

    ``wall`` is the training clock: all of the loop but evaluation and checkpoints. ``update`` and
    ``data_wait`` are parts of it: SVDs with all that follows, and waiting for data.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(NAMES, 0.0)
        self._since: float | None = None

    @contextmanager
    def training(self) -> Iterator[None]:
        """Run the training clock; :meth:`aside` stops it meanwhile."""
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self.seconds["wall"] = self.wall
            self._since = None

    @property
    def wall(self) -> float:
        """Seconds of training so far."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self.seconds["wall"] + running

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """Time something that is no training, with the training clock stopped."""
        self._finish_kernels()
        start, running = time.perf_counter(), self._since is not None
        self.seconds["wall"] = self.wall
        try:
            yield
        finally:
            now = time.perf_counter()
            self.seconds[name] += now - start
            self._since = now if running else None

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that are a part of training."""
        self.seconds[name] += seconds

    def _finish_kernels(self) -> None:
        """What a GPU still has to do belongs to training."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def state_dict(self) -> dict[str, float]:
        """Seconds so far."""
        return {**self.seconds, "wall": self.wall}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.seconds = {name: float(state[name]) for name in NAMES}
