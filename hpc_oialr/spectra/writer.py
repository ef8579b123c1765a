"""What a run hands its events to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hpc_oialr.spectra.async_writer import AsyncWriter
from hpc_oialr.spectra.rows import Event, steps_of, together
from hpc_oialr.spectra.store import ResilientStore

if TYPE_CHECKING:
    from hpc_oialr.method.report import UpdateReport

# Rows of steps ride along with events; without any they are written by so many.
_STEPS = 256


# An event, if there is one, and the rows of steps that came before it.
_Job = tuple[Event | None, Sequence[Mapping[str, float]]]


class SpectraWriter:
    """Takes events, and writes them beside the training.

    :meth:`write` copies the singular values and returns. An event is on the disk once :attr:`written` has counted
    it, and all are when :meth:`flush` has returned, as it has before a checkpoint: so a run that is killed and
    goes on from its checkpoint has lost nothing. Nothing here raises for what a file system does; see
    :class:`ResilientStore`.

    Parameters
    ----------
    store
        Where rows go.
    layers
        The model's layers, in order: their places in it. Others are added behind them.
    queue
        How many events may wait.
    patience_s
        See :class:`AsyncWriter`.
    """

    def __init__(
        self, store: ResilientStore, layers: Sequence[str] = (), *, queue: int = 64, patience_s: float = 60.0
    ) -> None:
        self.store = store
        self._places = {name: place for place, name in enumerate(layers)}
        self._steps: list[Mapping[str, float]] = []
        self._queue = AsyncWriter(self._do, queue, name=str(store.head), patience_s=patience_s)

    @property
    def written(self) -> int:
        """Events that are on the disk, of those since this writer was made."""
        return self.store.written

    def write(self, report: UpdateReport, *, wait: bool = False) -> None:
        """Hand over an event.

        Parameters
        ----------
        wait
            Return only once it is on the disk, or in memory if no disk can take it.
        """
        for layer in report.layers:
            self._places.setdefault(layer.name, len(self._places))
        self._put(Event.of(report))
        if wait:
            self._queue.drain()

    def add_steps(self, row: Mapping[str, float]) -> None:
        """Hand over one row of the table of steps; it is written with the next event, or by :meth:`flush`."""
        self._steps.append(row)
        if len(self._steps) >= _STEPS:
            self._put(None)

    def flush(self) -> bool:
        """Return once all that was handed over is on the disk.

        Returns
        -------
        False if the file system hangs: what is left is written when it goes on.
        """
        if self._steps:
            self._put(None)
        if not self._queue.drain():
            return False
        self.store.settle()
        return True

    def truncate_after(self, t: int) -> None:
        """Drop rows of later steps, as a run does that goes on from an older checkpoint."""
        if self.flush():
            self.store.cut_after(t)

    def finish(self) -> None:
        """Make the record of a run that has come to its end one file."""
        if self.flush():
            self.store.finish()

    def close(self) -> None:
        """Write what is left, and let go of the files."""
        if self._steps:
            self._put(None)
        if self._queue.close():
            self.store.close()

    def _put(self, event: Event | None) -> None:
        steps, self._steps = self._steps, []
        self._queue.put((event, steps))

    def _do(self, jobs: Sequence[_Job]) -> None:
        events = [event.rows(self._places) for event, _ in jobs if event is not None]
        if rows := together([*events, steps_of([row for _, steps in jobs for row in steps])]):
            self.store.append(rows)
