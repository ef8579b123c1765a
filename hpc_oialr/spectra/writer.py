"""Takes the events of a run and writes them in the background."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hpc_oialr.spectra.async_writer import AsyncWriter
from hpc_oialr.spectra.rows import copied, rows_of_update, steps_of, together
from hpc_oialr.spectra.store import ResilientStore

if TYPE_CHECKING:
    from hpc_oialr.method.report import UpdateReport

# Rows of steps ride along with events; without any they are written by so many.
_STEPS = 256


# An update, if there is one, and the rows of steps that came before it.
_Job = tuple["UpdateReport | None", Sequence[Mapping[str, float]]]


class SpectraWriter:
    """Writes events in a background thread.

    :meth:`write` copies the singular values and returns. An event is on the disk once :attr:`written` counts it;
    all are once :meth:`flush` has returned, which a run calls before each checkpoint. So a run that is killed and
    resumed has lost nothing. File system errors do not raise; see :class:`ResilientStore`.

    Parameters
    ----------
    store
        Where rows go.
    layers
        Names of the model's layers, in its order. Others are numbered after them.
    queue
        How many events may wait to be written.
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
        """Events on the disk, of those given to this writer."""
        return self.store.written

    def write(self, report: UpdateReport, *, wait: bool = False) -> None:
        """Queue an event.

        Parameters
        ----------
        wait
            Return only once it is on the disk, or in memory if no disk can take it.
        """
        for layer in report.layers:
            self._places.setdefault(layer.name, len(self._places))
        self._put(copied(report))
        if wait:
            self._queue.drain()

    def add_steps(self, row: Mapping[str, float]) -> None:
        """Keep a row of the table of steps; it is written with the next event, or by :meth:`flush`."""
        self._steps.append(row)
        if len(self._steps) >= _STEPS:
            self._put(None)

    def flush(self) -> bool:
        """Return once everything is on the disk.

        Returns
        -------
        False if the file system hangs: the rest is written once it responds again.
        """
        if self._steps:
            self._put(None)
        if not self._queue.drain():
            return False
        self.store.settle()
        return True

    def truncate_after(self, t: int) -> None:
        """Drop rows of later steps: a resumed run writes them again."""
        if self.flush():
            self.store.cut_after(t)

    def finish(self) -> None:
        """Join all files into one, at the end of a run."""
        if self.flush():
            self.store.finish()

    def close(self) -> None:
        """Write what is left and end the thread."""
        if self._steps:
            self._put(None)
        if self._queue.close():
            self.store.close()

    def _put(self, report: UpdateReport | None) -> None:
        steps, self._steps = self._steps, []
        self._queue.put((report, steps))

    def _do(self, jobs: Sequence[_Job]) -> None:
        updates = [rows_of_update(report, self._places) for report, _ in jobs if report is not None]
        if rows := together([*updates, steps_of([row for _, steps in jobs for row in steps])]):
            self.store.append(rows)
