"""Seconds of a run's parts, and when to stop so that a checkpoint still fits before the end of the job."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_NAMES = ("wall", "update", "data_wait", "eval", "checkpoint")
_SAFETY = 2.0  # times the longest step and the longest checkpoint so far are kept
# Assumed for the first checkpoint: this share of the time left, at most so many seconds.
_FIRST_SHARE, _FIRST_MOST_S = 0.1, 120.0
_EXIT_S = 10.0  # closing files, ending the process, asking for another job


class Timers:
    """Seconds of each part of a run, those before a resume included.

    ``wall`` is the training clock: the loop without evaluations and checkpoints; it includes ``update`` (SVDs and
    what follows them) and ``data_wait``.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(_NAMES, 0.0)
        self._since: float | None = None

    @contextmanager
    def training(self) -> Iterator[None]:
        """Run the training clock; :meth:`aside` pauses it."""
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
        """Time what is not training, with the training clock paused."""
        if self.device.type == "cuda":
            # Queued kernels belong to training.
            torch.cuda.synchronize(self.device)
        start, running = time.perf_counter(), self._since is not None
        self.seconds["wall"] = self.wall
        try:
            yield
        finally:
            now = time.perf_counter()
            self.seconds[name] += now - start
            self._since = now if running else None

    def state_dict(self) -> dict[str, float]:
        """Seconds so far."""
        return {**self.seconds, "wall": self.wall}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from :meth:`state_dict`."""
        self.seconds = {name: float(state[name]) for name in _NAMES}


@dataclass(frozen=True)
class StopRequest:
    """What may end a run early: a reason on this rank ("" if none), and the time at which the job is killed."""

    asked: Callable[[], str] = lambda: ""
    deadline: float | None = None  # Unix time (s)


class Stopping:
    """Decides when to stop, from the request and from how long steps and checkpoints have taken.

    ``checkpoint_s`` is the longest checkpoint so far (s), 0 before the first; ``clock`` gives Unix time.
    """

    def __init__(
        self, request: StopRequest, *, checkpoint_s: float = 0.0, clock: Callable[[], float] = time.time
    ) -> None:
        self.request, self.checkpoint_s = request, checkpoint_s
        self._clock, self._since, self._longest_step_s = clock, clock(), 0.0

    def wanted(self) -> bool:
        """Whether this rank wants to stop; called after every step, evaluations included."""
        now = self._clock()
        self._longest_step_s = max(self._longest_step_s, now - self._since)
        self._since = now
        return bool(self._own_reason())

    def _own_reason(self) -> str:
        reason, deadline, now = self.request.asked(), self.request.deadline, self._clock()
        if reason or deadline is None or now + self.needed_s < deadline:
            return reason
        return f"{deadline - now:.0f} s before the end of the job"

    @property
    def needed_s(self) -> float:
        """Seconds to keep for the step in which all ranks learn of the stop, the checkpoint, and the exit."""
        checkpoint_s, deadline = self.checkpoint_s, self.request.deadline
        if not checkpoint_s and deadline is not None:
            checkpoint_s = min(_FIRST_MOST_S, _FIRST_SHARE * max(0.0, deadline - self._clock()))
        return _SAFETY * (self._longest_step_s + checkpoint_s) + _EXIT_S

    def saved(self, seconds: float) -> None:
        """Count a checkpoint that took ``seconds``."""
        self.checkpoint_s = max(self.checkpoint_s, seconds)
        self.restart()

    def restart(self) -> None:
        """Do not count the time since the last step as a step."""
        self._since = self._clock()

    @property
    def reason(self) -> str:
        """Why this rank stops."""
        return self._own_reason() or "stop requested by another rank"
