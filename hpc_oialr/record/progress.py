"""Progress of a run: a live display in a terminal, plain lines elsewhere; and its throughput."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

Clock = Callable[[], float]
_REFRESH_S = 0.25
STRAGGLES = 1.2  # a rank whose own time is so many times the median rank's is shown


@dataclass(frozen=True, kw_only=True)
class Status:
    """A run at one moment."""

    step: int
    total_steps: int
    phase: Literal["full-rank", "low-rank"]
    loss: float  # of training
    trained_share: float  # trained parameters, of the dense model's, in [0, 1]
    rate: float  # items per second
    unit: str  # "images", "tokens", "samples"
    data_wait_share: float  # of the time, in [0, 1]
    memory_bytes: int  # peak so far
    eta_s: float
    metric: float | None = None  # last evaluation, if there was one
    metric_name: str = ""
    mfu: float | None = None  # of the last steps, in [0, 1]
    left_s: float | None = None  # time to the end of the job, if it has one
    slowest_rank: int | None = None  # where that is measured
    slowest_ratio: float = 1.0  # its own time over the median rank's

    def words(self) -> list[str]:
        """One figure each, as they are shown."""
        of_the_job = "" if self.left_s is None else f" of {clock_time(max(0.0, self.left_s))} left in the job"
        evaluation = [] if self.metric is None else [f"{self.metric_name} {self.metric:.4f}"]
        return [
            f"step {self.step}/{self.total_steps}",
            self.phase,
            f"loss {self.loss:.4f}",
            *evaluation,
            f"trained {self.trained_share:.1%}",
            f"{self.rate:,.0f} {self.unit}/s",
            *([] if self.mfu is None else [f"MFU {self.mfu:.0%}"]),
            f"data wait {self.data_wait_share:.0%}",
            *(
                []
                if self.slowest_ratio < STRAGGLES
                else [f"rank {self.slowest_rank} is slow, x {self.slowest_ratio:.2f}"]
            ),
            f"memory {self.memory_bytes / 2**30:.2f} GiB",
            f"ETA {clock_time(self.eta_s)}{of_the_job}",
        ]


class Progress:
    """Shows a run; this one shows nothing."""

    def update(self, status: Status) -> None:
        """Show the status if it is due."""

    def note(self, text: str) -> None:
        """Show one line that stays: a conversion, an evaluation."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class PlainProgress(Progress):
    """One line every ``every_s`` seconds, and at the end."""

    def __init__(self, stream: TextIO, every_s: float = 10.0, clock: Clock = time.monotonic) -> None:
        self._stream, self._every_s, self._clock = stream, every_s, clock
        self._next = clock()

    def update(self, status: Status) -> None:
        """Show the status if ``every_s`` seconds have passed or the run is at its end."""
        if status.step >= status.total_steps or self._clock() >= self._next:
            self._next = self._clock() + self._every_s
            self._show(status)

    def _show(self, status: Status) -> None:
        self.note(" | ".join(status.words()))

    def note(self, text: str) -> None:
        """Write a line."""
        self._stream.write(text + "\n")
        self._stream.flush()


class LiveProgress(PlainProgress):
    """A bar and a line of figures, redrawn at most four times a second; notes are printed above."""

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        super().__init__(stream, _REFRESH_S, clock)
        # Drawn by the caller: a thread of its own would compete with the training step for the interpreter.
        self._live = Live(console=Console(file=stream), auto_refresh=False)
        self._live.start()

    def _show(self, status: Status) -> None:
        bar = ProgressBar(total=status.total_steps, completed=status.step)
        self._live.update(Group(bar, Text("  ".join(status.words()))), refresh=True)

    def note(self, text: str) -> None:
        """Write a line above the bar."""
        self._live.console.print(Text(text))

    def close(self) -> None:
        """Stop drawing; the last picture stays."""
        self._live.stop()


def make_progress(*, show: bool = True, stream: TextIO | None = None) -> Progress:
    """The display that fits: none (``show=False``), live if the stream is a terminal, otherwise plain lines."""
    if not show:
        return Progress()
    stream = stream or sys.stderr
    return LiveProgress(stream) if stream.isatty() else PlainProgress(stream)


def clock_time(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> clock_time(65), clock_time(3 * 3600 + 61.4)
    ('1:05', '3:01:01')
    """
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


class Throughput:
    """Items per second, share of time spent waiting for data, time left: exponential averages over ``memory`` steps."""

    def __init__(self, *, memory: int = 20, clock: Clock = time.monotonic) -> None:
        self._keep = 1 - 1 / memory
        self._clock = clock
        self._weight = self._items = self._seconds = self._waited = 0.0
        self._last = clock()

    def tick(self, items: int, waited_s: float = 0.0) -> None:
        """Count one step of ``items``, of which ``waited_s`` seconds were spent waiting for data."""
        now = self._clock()
        self._weight = self._weight * self._keep + 1
        self._items = self._items * self._keep + items
        self._seconds = self._seconds * self._keep + (now - self._last)
        self._waited = self._waited * self._keep + waited_s
        self._last = now

    def restart(self) -> None:
        """Leave out the time since the last step: an evaluation or a checkpoint."""
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
