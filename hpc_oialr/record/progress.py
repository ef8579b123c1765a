"""What a person sees while a run goes on: a live display in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

_REFRESH_S = 0.25


@dataclass(frozen=True, kw_only=True)
class Status:
    """A run at one moment.

    Attributes
    ----------
    step, total_steps
        Steps done, of all.
    phase
        "full-rank" or "low-rank".
    loss
        Training loss.
    metric, metric_name
        Last evaluation, if there was one.
    trained_share
        Trained parameters, of the dense model's, in [0, 1].
    rate, unit
        Items per second, and what they are ("images", "tokens", "samples").
    data_wait_share
        Share of the time spent waiting for data, in [0, 1].
    memory_bytes
        Peak memory so far (bytes).
    eta_s
        Time to the end (s).
    left_s
        Time to the end of the job, if it has one (s).
    """

    step: int
    total_steps: int
    phase: Literal["full-rank", "low-rank"]
    loss: float
    trained_share: float
    rate: float
    unit: str
    data_wait_share: float
    memory_bytes: int
    eta_s: float
    metric: float | None = None
    metric_name: str = ""
    left_s: float | None = None


class Progress(Protocol):
    """Shows a run; every method returns at once."""

    def update(self, status: Status, *, evaluated: bool = False) -> None:
        """Show the status; ``evaluated`` says that the metric is new."""

    def note(self, text: str) -> None:
        """Show one line that stays: a conversion, a checkpoint, a warning."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def make_progress(
    *, show: bool = True, live: bool | None = None, stream: TextIO | None = None, every_s: float = 10.0
) -> Progress:
    """The display that fits.

    Parameters
    ----------
    show
        False on all processes but the main one.
    live
        Whether to draw over what was drawn; default: if the stream is a terminal.
    stream
        Where to; default standard error.
    every_s
        Seconds between plain lines.
    """
    stream = stream or sys.stderr
    if not show:
        return SilentProgress()
    return (
        LiveProgress(stream)
        if (stream.isatty() if live is None else live)
        else PlainProgress(stream, every_s)
    )


class SilentProgress:
    """Shows nothing."""

    def update(self, status: Status, *, evaluated: bool = False) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class PlainProgress:
    """One line every so many seconds, and at each evaluation."""

    def __init__(
        self, stream: TextIO, every_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream, self._every_s, self._clock = stream, every_s, clock
        self._next = clock()

    def update(self, status: Status, *, evaluated: bool = False) -> None:
        """Write a line if one is due."""
        if evaluated or status.step >= status.total_steps or self._clock() >= self._next:
            self._next = self._clock() + self._every_s
            self.note(" | ".join(describe(status)))

    def note(self, text: str) -> None:
        """Write a line."""
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Nothing: lines stay."""


class LiveProgress:
    """A bar and a line of figures, redrawn at most four times a second."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        # Drawn by the caller, not by a thread of its own, which would take turns with the training step.
        self._live = Live(console=Console(file=stream), auto_refresh=False)
        self._clock, self._next = clock, clock()
        self._live.start()

    def update(self, status: Status, *, evaluated: bool = False) -> None:
        """Redraw if it is time."""
        if evaluated or status.step >= status.total_steps or self._clock() >= self._next:
            self._next = self._clock() + _REFRESH_S
            bar = ProgressBar(total=status.total_steps, completed=status.step)
            self._live.update(Group(bar, Text("  ".join(describe(status)))), refresh=True)

    def note(self, text: str) -> None:
        """Write a line above the bar."""
        self._live.console.print(Text(text))

    def close(self) -> None:
        """Stop drawing; the last picture stays."""
        self._live.stop()


def describe(status: Status) -> list[str]:
    """The status in words, one figure each."""
    parts = [
        f"step {status.step}/{status.total_steps}",
        status.phase,
        f"loss {status.loss:.4f}",
        f"trained {status.trained_share:.1%}",
        f"{status.rate:,.0f} {status.unit}/s",
        f"data wait {status.data_wait_share:.0%}",
        f"memory {status.memory_bytes / 2**30:.2f} GiB",
        f"ETA {clock_time(status.eta_s)}{_of_the_job(status.left_s)}",
    ]
    if status.metric is not None:
        parts.insert(3, f"{status.metric_name} {status.metric:.4f}")
    return parts


def _of_the_job(left_s: float | None) -> str:
    return "" if left_s is None else f" of {clock_time(max(0.0, left_s))} left in the job"


def clock_time(seconds: float) -> str:
    """Hours, minutes and seconds.

    Examples
    --------
    >>> clock_time(65), clock_time(3 * 3600 + 61.4)
    ('1:05', '3:01:01')
    """
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
