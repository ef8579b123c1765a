"""A run's spectra: what of its events and steps goes into the record, and when it must be there."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from hpc_oialr.method.report import UpdateReport
from hpc_oialr.record import RunFolder
from hpc_oialr.spectra.store import Chain
from hpc_oialr.spectra.writer import SpectraWriter
from hpc_oialr.train.run_context import RunContext
from hpc_oialr.train.timers import Timers

log = logging.getLogger(__name__)


class SpectraRecord:
    """Writes ``spectra.h5`` on rank 0, which holds all values anyway; the same calls on each process.

    Parameters
    ----------
    folder
        The run's.
    context
        What is run.
    attributes
        Of the root.
    """

    def __init__(self, folder: RunFolder, context: RunContext, attributes: Mapping[str, Any]) -> None:
        config = context.config.record
        self.writer: SpectraWriter | None = None
        if config.spectra is not False and context.world.is_main:
            if config.side_folder is not None:
                log.warning(
                    "record.side_folder has no effect: while the disk is full spectra wait in memory."
                )
            chain = Chain(folder.spectra, attributes)
            self.writer = SpectraWriter(chain, context.controller.layers, queue_length=config.spectra_queue)

    def begin(self, step: int) -> None:
        """Go on after ``step`` steps."""
        if self.writer is not None:
            self.writer.truncate_after(step)

    def write(self, report: UpdateReport) -> None:
        """An event, as all processes saw it."""
        if self.writer is not None:
            self.writer.write(report)

    def add_steps(self, row: Mapping[str, Any], timers: Timers, **own: float) -> None:
        """A row of ``metrics.jsonl``, with some more fields of the table of steps."""
        if self.writer is None:
            return
        phases = {f"{name}_s": timers.seconds[name] for name in ("update", "data_wait", "eval", "checkpoint")}
        self.writer.add_steps({name: row[name] for name in ("step", "loss", "lr", "wall_s")} | phases | own)

    def flush(self) -> None:
        """Before a checkpoint: a run that goes on from it has lost nothing."""
        if self.writer is not None:
            self.writer.flush()

    def finish(self) -> None:
        """At the run's end: one file."""
        if self.writer is not None:
            self.writer.finish()

    def close(self) -> None:
        """Write what is left, also after an error."""
        if self.writer is not None:
            self.writer.close()
