"""When to stop: somebody asks, or the end of the job is so near that a checkpoint only just fits."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

# A checkpoint may take this many times the longest so far; so may a step.
_SAFETY = 2.0
# Until a first checkpoint has shown how long it takes: this share of the time that is left, at most so long (s).
_GUESS, _MOST_S = 0.1, 120.0
# The way out: closing files, ending the process, asking for another job (s).
_WAY_OUT_S = 10.0


def _nobody() -> str:
    return ""


@dataclass(frozen=True)
class StopRequest:
    """What may end a run early.

    Attributes
    ----------
    asked
        Who asks for a stop, on this process; "" as long as nobody does.
    deadline
        Unix time at which the processes will be killed (s); None if they will not.
    """

    asked: Callable[[], str] = _nobody
    deadline: float | None = None


class Stopping:
    """Weighs a request against what checkpoints and steps have taken so far.

    Parameters
    ----------
    request
        What may end the run.
    checkpoint_s
        What the longest checkpoint took so far, 0 if there was none (s).
    clock
        Unix time (s).
    """

    def __init__(
        self, request: StopRequest, *, checkpoint_s: float = 0.0, clock: Callable[[], float] = time.time
    ) -> None:
        self.request, self.checkpoint_s = request, checkpoint_s
        self._clock, self._since, self._longest_step_s = clock, clock(), 0.0

    def wanted(self) -> bool:
        """Whether this process wants to stop; to be asked after every step, evaluations included."""
        now = self._clock()
        self._longest_step_s = max(self._longest_step_s, now - self._since)
        self._since = now
        deadline = self.request.deadline
        return bool(self.request.asked()) or (deadline is not None and now + self.needed_s >= deadline)

    @property
    def needed_s(self) -> float:
        """Seconds to keep for the step in which all learn of it, the checkpoint, and the way out."""
        return _SAFETY * (self._longest_step_s + self._checkpoint_s()) + _WAY_OUT_S

    def _checkpoint_s(self) -> float:
        if self.checkpoint_s or self.request.deadline is None:
            return self.checkpoint_s
        return min(_MOST_S, _GUESS * max(0.0, self.request.deadline - self._clock()))

    def saved(self, seconds: float) -> None:
        """Count a checkpoint of so many seconds."""
        self.checkpoint_s = max(self.checkpoint_s, seconds)
        self.restart()

    def restart(self) -> None:
        """Leave out the time since the last step."""
        self._since = self._clock()

    @property
    def reason(self) -> str:
        """Why this process stops."""
        asker = self.request.asked()
        if asker:
            return asker
        if self.request.deadline is not None and self._clock() + self.needed_s >= self.request.deadline:
            return f"{self.request.deadline - self._clock():.0f} s before the end of the job"
        return "stop requested by another rank"
