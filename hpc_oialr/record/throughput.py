"""How fast a run goes: items per second, share of time spent waiting for data, time left."""

from __future__ import annotations

import time
from collections.abc import Callable


class Throughput:
    """Exponential averages over the last steps.

    Parameters
    ----------
    memory
        Number of steps after which one counts about a third.
    clock
        Monotonic seconds.
    """

    def __init__(self, *, memory: int = 20, clock: Callable[[], float] = time.monotonic) -> None:
        self._keep = 1 - 1 / memory
        self._clock = clock
        self._weight = self._items = self._seconds = self._waited = 0.0
        self._last = clock()

    def tick(self, items: int, waited_s: float = 0.0) -> None:
        """Count one step of so many items, of which so many seconds went by waiting for data."""
        now = self._clock()
        self._weight = self._weight * self._keep + 1
        self._items = self._items * self._keep + items
        self._seconds = self._seconds * self._keep + (now - self._last)
        self._waited = self._waited * self._keep + waited_s
        self._last = now

    def restart(self) -> None:
        """Leave out the time since the last step: evaluations and checkpoints are no training."""
        self._last = self._clock()

    @property
    def items_per_s(self) -> float:
        """Items per second; 0 before the first step."""
        return self._items / self._seconds if self._seconds else 0.0

    @property
    def data_wait_share(self) -> float:
        """Share of the time in which the step waited for data, in [0, 1]."""
        return min(1.0, self._waited / self._seconds) if self._seconds else 0.0

    def eta_s(self, steps: int) -> float:
        """Seconds until so many more steps are done; 0 before the first step."""
        return steps * self._seconds / self._weight if self._weight else 0.0
