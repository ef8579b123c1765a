"""Traces of torch's profiler for a few steps of a run, one file a rank."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile, schedule

log = logging.getLogger(__name__)

# Steps before the trace: the optimizer makes its state, kernels are compiled and chosen, a CUDA graph is captured; then
# those in which the profiler itself starts.
SKIPPED, WARM_UP = 8, 2


class StepProfiler:
    """Writes ``FOLDER/rank<N>.json``, for https://ui.perfetto.dev, of ``steps`` steps; nothing if that is None.

    Costs time and memory while it records only. A run that ends meanwhile leaves a trace of the steps it had.
    """

    def __init__(self, steps: int | None, folder: Path, rank: int) -> None:
        self._target = folder / f"rank{rank}.json"
        self._profiler: Any = None
        if steps is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        plan = schedule(wait=0, skip_first=SKIPPED, warmup=WARM_UP, active=steps, repeat=1)
        self._profiler = profile(activities=activities, schedule=plan, on_trace_ready=self._write, acc_events=True)
        self._profiler.start()

    @property
    def on(self) -> bool:
        """Whether the profiler runs now: torch allows one at a time."""
        return self._profiler is not None and self._profiler.current_action is not ProfilerAction.NONE

    def step(self) -> None:
        """Call after each step."""
        if self._profiler is not None:
            self._profiler.step()

    def close(self) -> None:
        """Stop, and write what was recorded."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _write(self, profiler: Any) -> None:
        unfinished = self._target.with_suffix(".tmp.json")
        try:
            profiler.export_chrome_trace(str(unfinished))
            unfinished.replace(self._target)
        except (OSError, RuntimeError) as error:
            log.warning("no trace could be written to %s (%s). The training goes on.", self._target, error)
