"""What recording spectra costs the demo: blocks of steps with it and without it, in turn, in one run.

A block goes from the middle between two updates of the method to the middle between the next two, so that each
holds one update, whose event is written within the block, and rows of steps. Blocks come in pairs, in an order that
changes. Two figures: the median over the pairs of the block's time with recording over the other's, with its 95 %
interval; and, free of the machine's noise, the time that the training itself spends in the writer's calls together
with the processor time of the writer's thread, over the time of all steps: the cost if nothing overlapped.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import Row, arguments, finish
from hpc_oialr.distributed import World, open_channel
from hpc_oialr.record import RunFolder
from hpc_oialr.spectra import open as open_spectra
from hpc_oialr.train.checkpoint_store import CheckpointStore
from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.process_settings import process_settings
from hpc_oialr.train.recorder import Recorder
from hpc_oialr.train.run_context import make_run_context
from hpc_oialr.train.trainer import Trainer

RECIPE = "fashion_mnist_vit"
RESAMPLES = 2000


class Demo:
    """The recipe's run, whose record of spectra can be switched off.

    Attributes
    ----------
    calls_s
        What the training has spent in the writer's calls.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        world = World.single("cpu")
        loaded = load_config(RECIPE, ["--train.steps", str(steps)])
        session = make_run_context(loaded.config, world)
        run = RunFolder(folder).create()
        self.recorder = Recorder(run, session, open_channel(world), {"config": loaded.tree})
        self.trainer = Trainer(session, CheckpointStore(run.checkpoints, world), self.recorder, settings={})
        writer = self.recorder.spectra
        assert writer is not None
        self.writer, self.calls_s = writer, 0.0
        for name in ("write", "add_steps"):
            setattr(writer, name, self._timed(getattr(writer, name)))
        self.recorder.begin(0)
        session.module.train()
        self._batches = self.trainer._batches()

    def block(self, steps: int, *, recording: bool) -> float:
        """Seconds of some steps; what is not on the disk yet is waited for outside of them."""
        self.recorder.spectra = self.writer if recording else None
        start = time.perf_counter()
        for batch in itertools.islice(self._batches, steps):
            self.trainer._step(batch)
        seconds = time.perf_counter() - start
        self.writer.flush()
        return seconds

    def thread_s(self) -> float:
        """Processor time of the writer's thread so far."""
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("writer of")]
        return sum(time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0)) for thread in threads)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*given, **options)
            self.calls_s += time.perf_counter() - start
            return result

        return timed


@contextlib.contextmanager
def demo_in(folder: Path, steps: int) -> Iterator[Demo]:
    """A demo whose files are closed at the end."""
    with process_settings(World.single("cpu")):
        demo = Demo(folder, steps)
        yield demo
        demo.recorder.spectra = demo.writer
        demo.recorder.close()


def pairs(demo: Demo, steps: int, count: int, budget_s: float) -> Iterator[tuple[float, float]]:
    """Seconds of a block with recording and of one without, again and again."""
    chance, end = random.Random(0), time.monotonic() + budget_s
    for _ in range(count):
        if time.monotonic() > end:
            return
        order = [True, False] if chance.random() < 0.5 else [False, True]
        seconds = {recording: demo.block(steps, recording=recording) for recording in order}
        yield seconds[True], seconds[False]


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % of the medians of samples drawn anew."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return medians[RESAMPLES // 40], medians[-RESAMPLES // 40]


def measure(count: int, budget_s: float) -> Row:
    """All pairs of blocks; one row."""
    method = load_config(RECIPE).config.oialr
    assert method is not None
    frequency, first = method.frequency, method.delay + method.frequency // 2
    with (
        tempfile.TemporaryDirectory() as scratch,
        demo_in(Path(scratch), first + frequency * (2 * count + 1)) as demo,
    ):
        demo.block(first + frequency, recording=True)
        calls_s, thread_s, written = demo.calls_s, demo.thread_s(), demo.writer.written
        found = list(pairs(demo, frequency, count, budget_s))
        events = demo.writer.written - written
        assert events == len(found), "each block with recording writes one event"
        calls_s, thread_s = demo.calls_s - calls_s, demo.thread_s() - thread_s
        with open_spectra(Path(scratch)) as run:
            layers = len(run)
    return {"recipe": RECIPE, "layers": layers, "steps_a_block": frequency} | figures(
        found, frequency, calls_s, thread_s
    )


def figures(found: list[tuple[float, float]], steps: int, calls_s: float, thread_s: float) -> Row:
    """What the pairs say."""
    ratios = [on / off for on, off in found]
    low, high = interval(ratios)
    return {
        "pairs": len(found),
        "step_ms": 1000 * statistics.median(off for _, off in found) / steps,
        "overhead": statistics.median(ratios) - 1,
        "overhead_low": low - 1,
        "overhead_high": high - 1,
        "calls_ms_an_event": 1000 * calls_s / len(found),
        "thread_cpu_ms_an_event": 1000 * thread_s / len(found),
        "overhead_if_nothing_overlapped": (calls_s + thread_s) / sum(on for on, _ in found),
    }


def main() -> None:
    """The demo's figures."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--pairs", type=int, default=60, help="pairs of blocks at most")
    parser.add_argument("--budget", type=float, default=420.0, help="no new pair after so many seconds")
    options = parser.parse_args()
    finish([measure(options.pairs, options.budget)], options.out)


if __name__ == "__main__":
    main()
