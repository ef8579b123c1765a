"""Write the updates of a run in a background thread, without stopping the training."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hpc_oialr.spectra.files import DAMAGE, record_files
from hpc_oialr.spectra.schema import Rows, copied, rows_of_update, steps_of, together
from hpc_oialr.spectra.store import Chain, merge

if TYPE_CHECKING:
    from hpc_oialr.method.report import UpdateReport

log = logging.getLogger(__name__)

_STEPS = 256  # rows of steps are written with the next update, or once there are so many
MEMORY_BYTES = 64 * 2**20  # of rows that wait for room on the disk


class SpectraWriter:
    """Writes updates in a background thread.

    :meth:`write` copies the singular values and returns. ``written`` counts updates that are on the disk; all are once
    :meth:`flush` has returned True. A run flushes before each checkpoint, so that a kill and a resume lose nothing.

    File system errors do not raise: rows stay in memory and are written with the next ones; beyond ``memory_bytes`` the
    newest are dropped and counted in ``dropped``.

    ``layers``: names of the model's layers, in its order; others are numbered after them. ``queue_length``: how many
    updates may wait for the thread.
    """

    def __init__(
        self,
        chain: Chain,
        layers: Sequence[str] = (),
        *,
        queue_length: int = 64,
        patience_s: float = 60.0,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self.chain, self.memory_bytes = chain, memory_bytes
        self.written = self.dropped = 0
        self._places = {name: place for place, name in enumerate(layers)}
        self._steps: list[Mapping[str, float]] = []
        self._waiting: list[Rows] = []
        self._failing = False
        self._queue = AsyncWriter(self._write, queue_length, name=str(chain.head), patience_s=patience_s)

    def write(self, report: UpdateReport, *, wait: bool = False) -> None:
        """Queue an update; with ``wait`` return once the thread has written it."""
        for layer in report.layers:
            self._places.setdefault(layer.name, len(self._places))
        self._put(copied(report))
        if wait:
            self._queue.drain()

    def add_steps(self, row: Mapping[str, float]) -> None:
        """Keep a row of the table of steps; it is written with the next update, or by :meth:`flush`."""
        self._steps.append(row)
        if len(self._steps) >= _STEPS:
            self._put()

    def flush(self, checkpoint: int | None = None) -> bool:
        """Wait until everything is on the disk; False if that is full or hangs: the rest is written later.

        ``checkpoint``: step of a checkpoint that was written after a flush returned False: try once more, without waiting
        for a disk that hangs, and if that fails warn of the steps that are only in memory.
        """
        self._put()
        done = self._queue.drain(None if checkpoint is None else 0) and self._write_waiting()
        if not done and checkpoint is not None:
            first = min((rows.first_step for rows in list(self._waiting)), default=checkpoint)
            log.warning(
                "%s: spectra of steps %d to %d are only in memory, and the checkpoint of step %d is written: if the run "
                "dies now, they are lost. Make room on the disk; the next checkpoint writes them. If the run dies first, "
                "delete checkpoints/step_* from step %d on, then resume: it starts from the one before, or anew.%s",
                *(self.chain.head, first, checkpoint, checkpoint, first),
                f" {self.dropped} updates did not fit into memory and are lost." if self.dropped else "",
            )
        return done

    def truncate_after(self, t: int) -> None:
        """Drop rows of later steps: a resumed run writes them again."""
        if self.flush():
            try:
                self.chain.cut_after(t)
            except DAMAGE as error:
                log.warning("%s cannot be cut after step %d (%s).", self.chain.head, t, error)

    def finish(self) -> None:
        """Join all files into one, at the end of a run."""
        head = self.chain.head
        if not (self.flush() and record_files(head)):
            return
        try:
            merge(head)
        except DAMAGE as error:
            log.warning(
                "%s stays in several files (%s); readers see them as one. Once that is put right: "
                "oialr spectra merge %s",
                *(head, error, head.parent),
            )

    def close(self) -> None:
        """Write what is left, end the thread, and warn of what was lost."""
        self._put()
        if self._queue.close():
            self._write_waiting()
            if lost := self.dropped + sum(rows.events for rows in self._waiting):
                log.warning("%s: %d updates could not be written and are lost.", self.chain.head, lost)

    def _put(self, *reports: UpdateReport) -> None:
        steps, self._steps = self._steps, []
        if reports or steps:
            self._queue.put((reports, steps))

    def _write(self, jobs: Sequence[tuple[Sequence[UpdateReport], Sequence[Mapping[str, float]]]]) -> None:
        updates = [rows_of_update(report, self._places) for reports, _ in jobs for report in reports]
        self._waiting.append(together([*updates, steps_of([row for _, steps in jobs for row in steps])]))
        self._write_waiting()

    def _write_waiting(self) -> bool:
        if not self._waiting:
            return True
        rows = together(self._waiting)
        try:
            self.chain.append(rows)
        except DAMAGE as error:
            if not self._failing:
                log.warning(
                    "%s cannot be written (%s); training continues, and up to %d MiB of the record are kept in memory.",
                    *(self.chain.head, error, self.memory_bytes >> 20),
                )
            self._failing = True
            while sum(kept.nbytes for kept in self._waiting) > self.memory_bytes:
                self.dropped += self._waiting.pop().events
            return False
        if self._failing:
            log.info("%s can be written again.", self.chain.head)
        self._failing = False
        self.written += rows.events
        self._waiting.clear()
        return True


class AsyncWriter:
    """Runs jobs in order in a background thread, all queued ones at once.

    A thread is enough: gzip, ``write`` and ``fsync`` release the GIL; ``python -m benchmarks.record`` measures the rest.

    :meth:`put` blocks while the queue is full, which is logged the first time. It and :meth:`drain` block no longer than
    ``patience_s``; then jobs are dropped and counted until the queue has room again: a file system that hangs must not
    stop a training. ``name`` is used in messages.
    """

    def __init__(self, work: Callable[[list[Any]], None], length: int, *, name: str, patience_s: float = 60.0) -> None:
        self.name, self.patience_s = name, patience_s
        self.waited_s, self.dropped = 0.0, 0
        self._work, self._stuck = work, False
        self._jobs: queue.Queue[Any] = queue.Queue(length)
        self._thread: threading.Thread | None = None

    def put(self, job: Any) -> None:
        """Queue a job; blocks only while the queue is full."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"writer of {self.name}", daemon=True)
            self._thread.start()
        full, start = self._jobs.full(), time.monotonic()
        try:
            self._jobs.put(job, timeout=0 if self._stuck else self.patience_s)
            self._stuck = False
        except queue.Full:
            self.dropped += 1
            self._stuck = True
        if not full:
            return
        waited = time.monotonic() - start
        if not self.waited_s:
            log.warning(
                "%s: %d updates wait to be written, and the training waited %.2f s for it%s. Later waits are "
                "added up at the end. Raise record.spectra_queue, or measure less often.",
                self.name,
                self._jobs.maxsize,
                waited,
                "; it hangs, and updates are dropped until it responds" if self._stuck else "",
            )
        self.waited_s += waited

    def drain(self, patience_s: float | None = None) -> bool:
        """Wait until all jobs are done; False after ``patience_s``, by default the queue's."""
        jobs, patience = self._jobs, self.patience_s if patience_s is None else patience_s
        with jobs.all_tasks_done:
            return jobs.all_tasks_done.wait_for(lambda: not jobs.unfinished_tasks, patience)

    def close(self) -> bool:
        """Finish queued jobs and end the thread; False if that takes longer than ``patience_s``."""
        done = self.drain()
        if done and self._thread is not None:
            self._jobs.put(None)
        if not done:
            left = self._jobs.unfinished_tasks
            log.warning("%s: %d jobs were not done within %g s.", self.name, left, self.patience_s)
        if self.waited_s:
            log.info("%s: the training waited %.2f s in all.", self.name, self.waited_s)
        if self.dropped:
            log.warning("%s: %d updates were dropped, since it hung or an error was logged.", self.name, self.dropped)
        return done

    def _run(self) -> None:
        while (first := self._jobs.get()) is not None:
            jobs = [first]
            with contextlib.suppress(queue.Empty):
                while (job := self._jobs.get_nowait()) is not None:
                    jobs.append(job)
            try:
                self._work(jobs)
            except Exception:
                # One bad job must end neither the thread, on which later jobs depend, nor the training.
                log.exception("%s: %d updates could not be written.", self.name, len(jobs))
                self.dropped += len(jobs)
            for _ in jobs:
                self._jobs.task_done()
        self._jobs.task_done()
