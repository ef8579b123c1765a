"""Writes rows to a chain of files that is complete after a kill at any moment, and to another folder if it must."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hpc_oialr.errors import DataError
from hpc_oialr.spectra.files import (
    chain_of,
    gaps_in,
    head_of,
    is_flush,
    make_side_folder,
    number_of,
    record_files,
    segment_path,
    side_files,
)
from hpc_oialr.spectra.flush_io import write_flush
from hpc_oialr.spectra.hdf5_io import write_record
from hpc_oialr.spectra.join import join, rows_of
from hpc_oialr.spectra.reader import Spectra, open_files
from hpc_oialr.spectra.record_file import DAMAGE, WHOLE_BYTES, RecordFile
from hpc_oialr.spectra.rows import Rows, together

log = logging.getLogger(__name__)

MEMORY_BYTES = 64 * 2**20


class Chain:
    """A record that grows by whole files; see :mod:`hpc_oialr.spectra.files`.

    HDF5 changes a file in place, and one killed meanwhile may never open again. So each flush is a file of its own,
    renamed into its place once it is on the disk: after a kill at any moment all rows are there whose :meth:`append`
    had returned, and others may read them at any moment. File locks, which many parallel file systems lack, do not
    matter.

    HDF5's own answer, SWMR, was tried (thirty kills on a local disk): all rows were there, but a killed writer
    leaves its file marked as open, so that plain readers, and a run that goes on, are refused until ``h5clear``
    was run by hand. Neither new layers nor the cut at a resume fit its rules (append only, to data sets that were
    there before), and it asks for a file system that keeps the order of writes, which NFS and Lustre do not.

    Parameters
    ----------
    head
        ``spectra.h5``. Existing files are continued; a damaged one stays, and is named in a warning.
    attributes
        Of the root of every file.
    join_flushes, join_bytes
        So many flushes, or so many bytes of them, are joined, so that readers need not open thousands of files. A
        joined file takes more rows until it has as many bytes: each row is written few times, however long the run.
    """

    def __init__(
        self,
        head: Path,
        attributes: Mapping[str, Any],
        *,
        join_flushes: int = 32,
        join_bytes: int = WHOLE_BYTES,
    ) -> None:
        self.head, self.attributes = head, attributes
        self.join_flushes, self.join_bytes = join_flushes, join_bytes

    def append(self, rows: Rows) -> None:
        """Add rows; when this returns they are on the disk.

        Raises
        ------
        OSError
            If they could not be written; the files are as before.
        """
        chain = chain_of(self.head)
        number = number_of(chain[-1]) + 1 if chain and not gaps_in(chain[:1]) else 0
        write_flush(segment_path(self.head, number, flush=True), self.attributes, rows)
        try:
            self._join_flushed()
        except DAMAGE as error:
            # The rows are on the disk all the same.
            log.info("flushes of %s stay apart for now (%s)", self.head, error)

    def cut_after(self, t: int) -> None:
        """Drop rows of later steps, newest files first: a resumed run writes them again."""
        for path in reversed(record_files(self.head)):
            try:
                with Spectra(path, [RecordFile(path)]) as run:
                    self._cut(run, t)
            except DataError as error:
                # The run continues; readers report it again.
                log.warning("%s", error)

    def _cut(self, run: Spectra, t: int) -> None:
        t_of_rows = np.concatenate([run.events["t"], run.steps["step"]])
        steps = run.steps[run.steps["step"] <= t]
        if not (t_of_rows > t).any():
            return
        # Only the last file can go without a gap.
        if (t_of_rows > t).all() and run.path == chain_of(head_of(run.path))[-1]:
            run.path.unlink()
        elif is_flush(run.path):
            write_flush(run.path, run.attributes, Rows(tuple(rows_of(run, t)), steps))
        else:
            write_record(run.path, run.attributes, rows_of(run, t), steps)

    def _join_flushed(self) -> None:
        """Join the flushes at the end of the chain once they are many, and the file before them while it is small."""
        chain = chain_of(self.head)
        flushes = [path for path in chain if is_flush(path)]
        if (
            len(flushes) < self.join_flushes
            and sum(path.stat().st_size for path in flushes) < self.join_bytes
        ):
            return
        joined = [path for path in chain if not is_flush(path)]
        small = [path for path in joined[-1:] if path.stat().st_size < self.join_bytes]
        # A join that was killed may have left flushes of the last joined file's number.
        free = max(number_of(flushes[0]), number_of(joined[-1]) + 1) if joined else number_of(flushes[0])
        target = small[0] if small else segment_path(self.head, free)
        with Spectra(self.head, [RecordFile(path) for path in small + flushes]) as run:
            join(run, target)


class ResilientStore:
    """Writes to the record's files while that can be done, then to side files, then keeps rows in memory.

    Nothing here raises: a failing record must not end a training. Rows that are kept in memory are written at the next
    :meth:`settle` that finds room; beyond ``memory_bytes`` the newest are dropped and counted.

    Parameters
    ----------
    main
        The record.
    side
        Its continuation, in a folder that only this user can write.

    Attributes
    ----------
    head
        ``spectra.h5``.
    written
        Events in files of either.
    """

    def __init__(self, main: Chain, side: Chain, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self.main, self.side, self.memory_bytes = main, side, memory_bytes
        self.head, self.written, self.dropped = main.head, 0, 0
        self._lost = False
        self._kept: list[Rows] = []

    def append(self, rows: Rows) -> None:
        """Write rows to the first place that takes them."""
        if self._kept or not ((not self._lost and self._to_main(rows)) or self._to_side(rows)):
            self._keep(rows)

    def settle(self) -> None:
        """Write what is kept in memory, if there is room now."""
        if not self._kept:
            return
        rows = together(self._kept)
        if self._to_main(rows) or self._to_side(rows):
            self._kept.clear()
            log.info("%s: what was kept in memory is written now.", self.head)

    def cut_after(self, t: int) -> None:
        """Drop rows of later steps, wherever they are."""
        if side_files(self.side.head):
            self._join_all()
        for chain in (self.main, self.side):
            try:
                chain.cut_after(t)
            except DAMAGE as error:
                log.warning("%s cannot be cut after step %d (%s).", chain.head, t, error)

    def finish(self) -> None:
        """Join all files into one."""
        self.settle()
        if record_files(self.head) or side_files(self.side.head):
            self._join_all()

    def close(self) -> None:
        """Try once more to write what is in memory; warn of what was lost."""
        self.settle()
        lost = self.dropped + sum(rows.events for rows in self._kept)
        if lost:
            log.warning("%s: %d events could be written nowhere and are lost.", self.head, lost)

    def _to_main(self, rows: Rows) -> bool:
        try:
            self.main.append(rows)
        except DAMAGE as error:
            if not self._lost:
                log.warning(
                    "%s cannot be written (%s); the training goes on, and the record continues in %s. Once there is "
                    "room: oialr spectra merge %s",
                    self.head,
                    error,
                    self.side.head,
                    self.head.parent,
                )
            self._lost = True
            return False
        self._lost = False
        self.written += rows.events
        return True

    def _to_side(self, rows: Rows) -> bool:
        try:
            make_side_folder(self.side.head)
            self.side.append(rows)
        except DAMAGE as error:
            log.info("%s: %s", self.side.head, error)
            return False
        self.written += rows.events
        return True

    def _keep(self, rows: Rows) -> None:
        if not self._kept:
            log.warning(
                "Nor can %s be written: up to %d MiB of the record stay in memory until a checkpoint finds room.",
                self.side.head,
                self.memory_bytes >> 20,
            )
        if sum(kept.nbytes for kept in self._kept) + rows.nbytes > self.memory_bytes:
            self.dropped += rows.events
        else:
            self._kept.append(rows)

    def _join_all(self) -> None:
        try:
            with Spectra(self.head, open_files(self.head, self.side.head)) as run:
                join(run, self.head)
        except DAMAGE as error:
            elsewhere = f", and {self.side.head} holds a part of it" if side_files(self.side.head) else ""
            log.warning(
                "%s stays in several files (%s)%s; readers see them as one. Once that is put right: oialr spectra "
                "merge %s",
                self.head,
                error,
                elsewhere,
                self.head.parent,
            )
        else:
            self._lost = False
