"""A record that grows by whole files, so that it is complete after a kill at any moment; and its files made one."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hpc_oialr.errors import DataError
from hpc_oialr.record.quantities import spectral_quantities
from hpc_oialr.spectra.files import (
    chain_of,
    gaps_in,
    head_of,
    is_flush,
    number_of,
    record_files,
    segment_path,
    write_flush,
    write_record,
)
from hpc_oialr.spectra.reader import Spectra
from hpc_oialr.spectra.record_file import DAMAGE, WHOLE_BYTES, RecordFile
from hpc_oialr.spectra.schema import LayerRows, Rows

log = logging.getLogger(__name__)


class Chain:
    """The files of a record, see :mod:`hpc_oialr.spectra.files`.

    HDF5 changes a file in place, and one killed meanwhile may never open again. So each flush is a file of its own,
    renamed into its place once it is on the disk: after a kill at any moment all rows are there whose :meth:`append`
    had returned, and others may read them at any moment. File locks, which many parallel file systems lack, do not
    matter.

    HDF5's own answer, SWMR, was tried (thirty kills on a local disk): all rows were there, but a killed writer
    leaves its file marked as open, so that plain readers, and a resumed run, are refused until ``h5clear`` was run by
    hand. Neither new layers nor the cut at a resume fit its rules (append only, to data sets that were there before),
    and it asks for a file system that keeps the order of writes, which NFS and Lustre do not.

    ``head`` is ``spectra.h5``; existing files are continued, a damaged one stays, and is named in a warning. So many
    flushes, or so many bytes of them, are joined, so that readers need not open thousands of files. A joined file takes
    more rows until it has as many bytes: each row is written few times, however long the run.
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
        """Add rows; when this returns they are on the disk. OSError if they could not be written, files are as before."""
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
                    _cut(run, t)
            except DataError as error:
                # The run continues; readers report it again.
                log.warning("%s", error)

    def _join_flushed(self) -> None:
        """Join the flushes at the end of the chain once they are many, and the file before them while it is small."""
        chain = chain_of(self.head)
        flushes = [path for path in chain if is_flush(path)]
        flushed = sum(path.stat().st_size for path in flushes)
        if len(flushes) < self.join_flushes and flushed < self.join_bytes:
            return
        joined = [path for path in chain if not is_flush(path)]
        small = [path for path in joined[-1:] if path.stat().st_size < self.join_bytes]
        # A join that was killed may have left flushes of the last joined file's number.
        free = max(number_of(flushes[0]), number_of(joined[-1]) + 1) if joined else number_of(flushes[0])
        target = small[0] if small else segment_path(self.head, free)
        with Spectra(self.head, [RecordFile(path) for path in small + flushes]) as run:
            _join(run, target)


def merge(path: Path | str) -> Path:
    """Join all files of a record, those of earlier versions too; ``path`` is a run's folder or its ``spectra.h5``.

    What a run does at its end, for one that was stopped or whose disk was full. No run may be writing there. DataError
    if there is none, or a file is damaged, OSError if there is no room: all files stay as they are.
    """
    head = head_of(Path(path))
    with Spectra(head) as run:
        _join(run, head)
    return head


def _join(run: Spectra, target: Path) -> None:
    """Write an open record, or some files of it, as one HDF5 file, and remove the others.

    The target is renamed into its place, then the others are removed, newest first: a kill in between leaves rows
    twice. Rows of version 1 get the quantities that follow from their singular values.
    """
    others = [file.path for file in run.files if file.path != target]
    if not others:
        return
    write_record(target, run.attributes, _rows_of(run), run.steps)
    for path in reversed(others):
        path.unlink(missing_ok=True)
    # Left by writes that were killed.
    for draft in target.parent.glob(f".{head_of(target).name}*.tmp"):
        draft.unlink(missing_ok=True)


def _cut(run: Spectra, t: int) -> None:
    """Drop rows of later steps from an open file."""
    t_of_rows = np.concatenate([run.events["t"], run.steps["step"]])
    if not (t_of_rows > t).any():
        return
    steps = run.steps[run.steps["step"] <= t]
    # Only the last file can go without a gap.
    if (t_of_rows > t).all() and run.path == chain_of(head_of(run.path))[-1]:
        run.path.unlink()
    elif is_flush(run.path):
        write_flush(run.path, run.attributes, Rows(tuple(_rows_of(run, t)), steps))
    else:
        write_record(run.path, run.attributes, _rows_of(run, t), steps)


def _rows_of(run: Spectra, until: int | None = None) -> Iterator[LayerRows]:
    """Rows of one layer after another, of those that have any."""
    for layer in run.values():
        kept = np.flatnonzero(layer.t <= until) if until is not None else np.arange(len(layer))
        if not len(kept):
            continue
        events, values = layer.events[kept], layer.singular_values[kept]
        for event, row in zip(events, values, strict=True):
            # Of version 1.
            if np.isnan(event["stable_rank"]):
                for name, figure in spectral_quantities(row[~np.isnan(row)], layer.m, layer.n).items():
                    event[name] = figure
        yield LayerRows(layer.name, layer.index, layer.m, layer.n, events, values)
