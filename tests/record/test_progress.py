"""What a person sees."""

from __future__ import annotations

import io
import sys

import pytest

from hpc_oialr.record import Status, Throughput, make_progress
from hpc_oialr.record.progress import LiveProgress, PlainProgress, Progress

STATUS = {
    "step": 30,
    "total_steps": 100,
    "phase": "low-rank",
    "loss": 1.23456,
    "trained_share": 0.0312,
    "rate": 12345.6,
    "unit": "images",
    "data_wait_share": 0.02,
    "memory_bytes": 3 << 29,
    "eta_s": 65.0,
}
LINE = "step 30/100 | low-rank | loss 1.2346 | trained 3.1% | 12,346 images/s | data wait 2%"
LINE += " | memory 1.50 GiB | ETA 1:05"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def status(**changes: object) -> Status:
    return Status(**(STATUS | changes))  # type: ignore[arg-type]


def test_plain_lines_come_every_so_many_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = PlainProgress(stream, every_s=10, clock=clock)
    for second in range(25):
        clock.now = second
        progress.update(status(step=second))
    progress.close()
    assert [line.split(" | ")[0] for line in stream.getvalue().splitlines()] == [
        "step 0/100",
        "step 10/100",
        "step 20/100",
    ]


def test_a_plain_line_holds_every_figure() -> None:
    stream = io.StringIO()
    PlainProgress(stream).update(status())
    assert stream.getvalue() == LINE + "\n"


def test_notes_and_the_end_are_always_shown() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream, every_s=1000)
    progress.update(status())
    progress.update(status(step=32))
    progress.update(status(step=100, metric=0.875, metric_name="accuracy"))
    progress.note("conversion of 24 layers")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("step 100/100")
    assert "loss 1.2346 | accuracy 0.8750 | trained" in lines[1]
    assert lines[2] == "conversion of 24 layers"


def test_the_live_display_draws_now_and_then() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = LiveProgress(stream, clock)
    progress.update(status())
    progress.update(status(step=31))
    clock.now = 1.0
    progress.update(status(step=32))
    progress.note("a [bracketed] note")
    progress.close()
    shown = stream.getvalue()
    assert "a [bracketed] note" in shown
    assert "step 31/100" not in shown
    assert "step 32/100" in shown


def test_the_display_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    assert isinstance(make_progress(stream=stream), PlainProgress)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(stream, "isatty", lambda: True)
    assert type(make_progress(show=False)) is Progress
    live = make_progress()
    assert isinstance(live, LiveProgress)
    live.close()


def test_other_processes_show_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    progress = make_progress(show=False)
    progress.update(status())
    progress.note("hidden")
    progress.close()
    assert capfd.readouterr() == ("", "")


def test_pace() -> None:
    clock = Clock()
    throughput = Throughput(clock=clock)
    assert (throughput.items_per_s, throughput.data_wait_share, throughput.eta_s(10)) == (0.0, 0.0, 0.0)
    for _ in range(50):
        clock.now += 2.0
        throughput.tick(128, waited_s=0.5)
    clock.now += 1000.0  # an evaluation
    throughput.restart()
    clock.now += 2.0
    throughput.tick(128, waited_s=0.5)
    assert throughput.items_per_s == pytest.approx(64.0)
    assert throughput.data_wait_share == pytest.approx(0.25)
    assert throughput.eta_s(10) == pytest.approx(20.0)


def test_pace_follows_a_change() -> None:
    clock = Clock()
    throughput = Throughput(memory=5, clock=clock)
    for seconds in [4.0] * 30 + [1.0] * 30:
        clock.now += seconds
        throughput.tick(10)
    assert throughput.items_per_s == pytest.approx(10.0, rel=0.02)
