"""Sections one after another, each case in its own try, each section within its own deadline."""

from __future__ import annotations

import gc
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from benchmarks.common import Row
from benchmarks.gpu.counts import start_peak
from benchmarks.gpu.results import Results, Section

# A case is stopped this share of the whole budget after its section's deadline: what is nearly done may end.
GRACE = 0.05
REPEATED_S = 5.0


@dataclass(frozen=True)
class Context:
    """What every section is told.

    Attributes
    ----------
    device
        Where to measure.
    tiny
        Smallest sizes, for a test of the instrument.
    data
        CIFAR-10 images, if any.
    deadline
        When the section should end (``time.monotonic``).
    """

    device: torch.device
    tiny: bool
    data: Path | None = None
    deadline: float = float("inf")

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Case:
    """A few rows that belong together, and their name if there is no time for them."""

    name: str
    measure: Callable[[], Iterable[Row]]


@dataclass(frozen=True)
class Plan:
    """A section: its share of the budget and its cases, the most telling first."""

    name: str
    weight: float
    cases: Callable[[Context], Sequence[Case]]


class NotRunError(Exception):
    """A case that cannot or should not be measured now; the message says why."""


class OutOfTimeError(BaseException):
    """The section's time is up; no ``except Exception`` of measured code may stop it."""


class DeviceLostError(RuntimeError):
    """The GPU answers no more after an error: nothing that follows could be measured."""


def run(plans: Sequence[Plan], context: Context, results: Results, budget_s: float) -> None:
    """Measure all plans within ``budget_s``; every failure is noted in the results, none is raised."""
    # What is imported by now lives to the end; collecting garbage between rows need not look at it.
    gc.freeze()
    try:
        _run_all(plans, context, results, budget_s)
    finally:
        gc.unfreeze()


def _run_all(plans: Sequence[Plan], context: Context, results: Results, budget_s: float) -> None:
    end = time.monotonic() + budget_s
    lost: str | None = None
    for position, plan in enumerate(plans):
        now = time.monotonic()
        share = plan.weight / sum(p.weight for p in plans[position:])
        own = Context(context.device, context.tiny, context.data, now + max(0.0, end - now) * share)
        section = results.section(plan.name)
        if lost is not None:
            section.leave_out("all", lost)
            continue
        print(f"{plan.name}: {own.left_s:.0f} s", flush=True)
        try:
            _run_section(plan, own, section, GRACE * budget_s)
        except DeviceLostError as error:
            lost = str(error)
        section.save(seconds=time.monotonic() - now)


def _run_section(plan: Plan, context: Context, section: Section, grace_s: float) -> None:
    try:
        cases = plan.cases(context)
    except Exception:
        section.fail("all", _trace())
        return
    for case in cases:
        if context.left_s <= 0:
            section.leave_out(case.name, "no time left")
            continue
        begin = time.monotonic()
        try:
            with _alarm(context.left_s + grace_s):
                for row in case.measure():
                    section.add(row)
        except NotRunError as error:
            section.leave_out(case.name, str(error))
        except OutOfTimeError:
            section.leave_out(case.name, f"stopped after {time.monotonic() - begin:.0f} s")
        except Exception:
            section.fail(case.name, _trace())
            _check_device(context.device, case.name)
        start_peak(context.device)


def _trace() -> str:
    """The error being handled, and where it was raised."""
    return "".join(traceback.format_exc(limit=-6))[-2000:]


def _check_device(device: torch.device, case: str) -> None:
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise DeviceLostError(f"the GPU was lost in {case}: {str(error).splitlines()[0]}") from error


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise :class:`OutOfTimeError` inside after so many seconds, where signals can do that: in the main thread."""
    if threading.current_thread() is not threading.main_thread() or seconds == float("inf"):
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    # Again and again, should code in between have turned the first one into an error of its own.
    signal.setitimer(signal.ITIMER_REAL, seconds, REPEATED_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
