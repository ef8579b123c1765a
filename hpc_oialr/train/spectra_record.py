"""A run's spectra: what of its events and steps goes into the record, and when it must be there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpc_oialr.method.report import UpdateReport
from hpc_oialr.processes import MetricsChannel
from hpc_oialr.record import RunFolder
from hpc_oialr.spectra.modes import finish_record, make_writer
from hpc_oialr.spectra.parallel import check_parallel
from hpc_oialr.train.clocks import Clocks
from hpc_oialr.train.config import RecordConfig
from hpc_oialr.train.session import Session


def check_record(config: RecordConfig, channel: MetricsChannel) -> None:
    """Raise :class:`ConfigError` if the record cannot be written in the way that the settings ask for."""
    if config.spectra is not False and config.spectra_writer == "parallel":
        check_parallel(getattr(channel, "comm", None))


class SpectraRecord:
    """Writes ``spectra.h5`` with all other processes, or leaves it be; the same calls on each of them.

    Parameters
    ----------
    folder
        The run's.
    session
        What is run.
    channel
        Its MPI communicator serves parallel HDF5.
    attributes
        Of the root.
    """

    def __init__(
        self, folder: RunFolder, session: Session, channel: MetricsChannel, attributes: Mapping[str, Any]
    ) -> None:
        config, self.session = session.config.record, session
        self.mode, self.path = config.spectra_writer, folder.spectra
        self.wanted = config.spectra is not False
        comm = getattr(channel, "comm", None) if self.mode == "parallel" else None
        self.writer = (
            make_writer(
                self.mode,
                self.path,
                session.world,
                layers=session.controller.layers,
                attributes=attributes,
                side_folder=config.side_folder,
                queue=config.spectra_queue,
                comm=None if comm is None else comm.Dup(),
            )
            if self.wanted
            else None
        )

    def begin(self, step: int) -> None:
        """Go on after ``step`` steps; a collective call in "parallel" mode."""
        if self.writer is not None:
            self.writer.truncate_after(step)

    def write(self, report: UpdateReport) -> None:
        """An event, as all processes saw it."""
        if self.writer is not None:
            self.writer.write(report)

    def add_steps(self, row: Mapping[str, Any], clocks: Clocks, **own: float) -> None:
        """A row of ``metrics.jsonl``, on the main process, with some more fields of the table of steps."""
        if self.writer is None:
            return
        phases = {f"{name}_s": clocks.seconds[name] for name in ("update", "data_wait", "eval", "checkpoint")}
        self.writer.add_steps({name: row[name] for name in ("step", "loss", "lr", "wall_s")} | phases | own)

    def flush(self) -> None:
        """Before a checkpoint: a run that goes on from it has lost nothing."""
        if self.writer is not None:
            self.writer.flush()

    def finish(self) -> None:
        """At the run's end, one file; a collective call."""
        if self.wanted:
            finish_record(self.mode, self.writer, self.path, self.session.world)

    def close(self) -> None:
        """Write what is left, also after an error."""
        if self.writer is not None:
            self.writer.close()
