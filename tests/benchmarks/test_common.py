"""Timing that all benchmarks share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import common


def test_ratios_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 10.0, 11.0, 20.0, 24.0, 30.0, 32.0, 40.0, 43.0, 50.0, 51.0])
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    functions = {"dense": lambda: None, "low": lambda: None}
    ratios, seconds = common.time_ratios(functions, "dense", repeats=3, warmup=0)
    assert ratios == {"dense": 1.0, "low": 0.5}
    assert seconds == 3.0


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call that is not measured keeps the GPU busy; ten that are follow between two events."""
    done: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("event")

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, other: Any) -> float:
            return 30.0  # ms

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert common.timed(lambda: done.append("call")) == pytest.approx(0.003)
    assert done == ["call", "event", *["call"] * 10, "event", "wait"]
