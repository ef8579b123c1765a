"""A background thread with a bounded queue."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


class AsyncWriter(Generic[T]):
    """Runs jobs in order in a background thread, all queued ones at once.

    A thread is enough: gzip, ``write`` and ``fsync`` release the GIL, and ``python -m benchmarks.record`` measures
    the rest. A process would import everything a second time and hold its memory.

    Parameters
    ----------
    work
        Does the queued jobs, oldest first.
    length
        Size of the queue. :meth:`put` blocks while it is full; the first time is logged as a warning.
    name
        Used in messages.
    patience_s
        Longest time that :meth:`put` and :meth:`drain` block (s). After it jobs are dropped and counted until the
        queue has room again: a file system that hangs must not stop a training.
    """

    def __init__(
        self, work: Callable[[list[T]], None], length: int, *, name: str, patience_s: float = 60.0
    ) -> None:
        self.name, self.length, self.patience_s = name, length, patience_s
        self.waited_s, self.dropped = 0.0, 0
        self._work = work
        self._waiting: list[T] = []
        self._busy = self._closing = self._stuck = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def put(self, job: T) -> None:
        """Queue a job; blocks only while the queue is full."""
        with self._changed:
            if len(self._waiting) >= self.length:
                self._wait_for_room()
            if len(self._waiting) >= self.length:
                self.dropped += 1
                return
            self._waiting.append(job)
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"writer of {self.name}", daemon=True)
            self._thread.start()

    def drain(self) -> bool:
        """Wait until all jobs are done; False after ``patience_s``."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._waiting or self._busy), self.patience_s)

    def close(self) -> bool:
        """Finish queued jobs and end the thread; False if that takes longer than ``patience_s``."""
        done = self.drain()
        if not done:
            log.warning(
                "%s: %d jobs were not done within %g s.", self.name, len(self._waiting), self.patience_s
            )
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self.waited_s:
            log.info("%s: the training waited %.2f s in all.", self.name, self.waited_s)
        if self.dropped:
            log.warning("%s: %d events were dropped while it hung.", self.name, self.dropped)
        return done

    def _wait_for_room(self) -> None:
        start = time.monotonic()
        patience = 0 if self._stuck else self.patience_s
        self._stuck = not self._changed.wait_for(lambda: len(self._waiting) < self.length, patience)
        waited = time.monotonic() - start
        if not self.waited_s:
            log.warning(
                "%s: %d events wait to be written, and the training waited %.2f s for it%s. Later waits are told "
                "at the end. Raise record.spectra_queue, or measure less often.",
                self.name,
                self.length,
                waited,
                "; it hangs, and events are dropped until it goes on" if self._stuck else "",
            )
        self.waited_s += waited

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                jobs, self._waiting, self._busy = self._waiting, [], True
                self._changed.notify_all()
            try:
                self._work(jobs)
            except Exception:
                # One bad job must end neither the thread, on which later jobs depend, nor the training.
                log.exception("%s: %d events could not be written.", self.name, len(jobs))
            with self._changed:
                self._busy = False
                self._changed.notify_all()
