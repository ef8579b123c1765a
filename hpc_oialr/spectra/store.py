"""Grow a record by whole files, complete after a kill at any moment; join them; repair what is damaged."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_oialr.errors import DataError
from hpc_oialr.outputs import claim
from hpc_oialr.spectra.files import (
    DAMAGE,
    WHOLE_BYTES,
    RecordFile,
    gaps_in,
    head_of,
    is_flush,
    number_of,
    record_files,
    segment_path,
    write_flush,
    write_record,
    written_by,
)
from hpc_oialr.spectra.reader import Spectra
from hpc_oialr.spectra.schema import EVENT, NO_STEPS, STEP, LayerRows, Rows, as_table, together

log = logging.getLogger(__name__)


class Chain:
    """The files of a record, see :mod:`hpc_oialr.spectra.files`.

    HDF5 changes a file in place, and one killed meanwhile may never open again. So each flush is a file of its own,
    renamed once it is on the disk: after a kill all rows whose :meth:`append` had returned are there, and readers need
    no file locks, which many parallel file systems lack.

    HDF5's SWMR mode was tried (thirty kills on a local disk): all rows were there, but a killed writer leaves its file
    marked as open until ``h5clear`` is run by hand. It also allows neither new layers nor the cut at a resume, and needs
    a file system that keeps the order of writes, which NFS and Lustre do not.

    ``head`` is ``spectra.h5``; existing files are continued, a damaged one is kept and named in a warning. Flushes are
    joined once there are ``join_flushes``, or ``join_bytes`` of them, so that readers open few files. A joined file grows
    up to ``join_bytes``: each row is written few times, however long the run.
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
        """Add rows; they are on the disk when this returns. OSError if that fails; files are then as before."""
        chain = record_files(self.head)
        number = number_of(chain[-1]) + 1 if chain else 0
        write_flush(segment_path(self.head, number, flush=True), self.attributes, rows)
        try:
            self._join_flushed()
        except DAMAGE as error:
            # The rows are on the disk anyway.
            log.info("flushes of %s stay apart for now (%s)", self.head, error)

    def cut_after(self, t: int) -> None:
        """Drop rows of later steps, newest files first: a resumed run writes them again."""
        for path in reversed(record_files(self.head)):
            try:
                with Spectra(path, [RecordFile(path)]) as run:
                    later = np.concatenate([run.events["t"], run.steps["step"]]) > t
                    if not later.any():
                        continue
                    steps = run.steps[run.steps["step"] <= t]
                    # Only the last file can be removed without a gap.
                    if later.all() and path == record_files(self.head)[-1]:
                        path.unlink()
                    elif is_flush(path):
                        write_flush(path, run.attributes, Rows(tuple(_rows_of(run, t)), steps))
                    else:
                        write_record(path, run.attributes, _rows_of(run, t), steps)
            except DataError as error:
                # The run continues; readers report it again.
                log.warning("%s", error)

    def _join_flushed(self) -> None:
        """Join the flushes at the end of the chain once they are many, and the file before them while it is small."""
        chain = record_files(self.head)
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
    """Join all files of a record; ``path`` is a run's folder or its ``spectra.h5``.

    A run does this at its end, unless it was stopped or the disk was full. No run may be writing. DataError if there is
    no record, or a file is damaged, OSError if there is no room: all files stay as they are.
    """
    head = head_of(Path(path))
    with Spectra(head) as run:
        _join(run, head)
    return head


def _join(run: Spectra, target: Path) -> None:
    """Write an open record, or some files of it, as one HDF5 file, and remove the others.

    The target is renamed into its place, then the others are removed, newest first: a kill in between leaves rows
    twice.
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


def _rows_of(run: Spectra, until: int | None = None) -> Iterator[LayerRows]:
    """Rows of one layer after another, of those that have any."""
    for layer in run.values():
        kept = np.flatnonzero(layer.t <= until) if until is not None else np.arange(len(layer))
        if not len(kept):
            continue
        tables = layer.events[kept], layer.singular_values[kept]
        yield LayerRows(layer.name, layer.index, layer.m, layer.n, *tables)


@dataclass(frozen=True)
class RepairResult:
    """What :func:`repair` did."""

    target: Path  # what it wrote
    layers: int
    events: int  # of all layers together
    lost: tuple[str, ...]  # one sentence for each thing that could not be read


def repair(path: Path | str, target: Path | None = None, *, force: bool = False) -> RepairResult:
    """Write all rows that can be read into a new file; existing files are not changed.

    Chunks of tables and HDF5's own blocks have checksums: what is read is right. Events whose singular values are lost
    get NaN. A file that cannot be opened is lost as a whole.

    ``path`` is a run's folder, its ``spectra.h5`` with all segments, or one segment; ``target`` by default the path plus
    ``.repaired.h5``. ``force``: replace a file that is not a repaired record. DataError if nothing can be read.
    """
    path, head = Path(path), head_of(Path(path))
    alone = path != head and not path.is_dir()
    paths, source = ([path], path) if alone else (record_files(head), head)
    target = target or source.with_name(f"{source.name}.repaired.h5")
    written = claim(target, written_by("oialr spectra repair"), inputs=[*paths, head.parent], force=force)
    saved: list[Rows] = []
    lost: list[str] = []
    attributes: dict[str, Any] = {}
    for each in paths:
        try:
            file = RecordFile(each)
        except DataError as error:
            lost.append(f"{each.name}: all of it ({error.__cause__ or error}).")
            continue
        with contextlib.closing(file):
            # Those of the oldest file win.
            attributes = {**file.attributes, **attributes}
            saved.append(_readable(file, lost))
    if not alone:
        lost = [f"{gap.name}: it is missing." for gap in gaps_in(paths)] + lost
    rows = together(saved)
    if not rows:
        raise DataError(f"nothing of {head} can be saved: {' '.join(lost) or 'there is no such file.'}")
    write_record(written, {**attributes, "written_by": "oialr spectra repair"}, rows.layers, rows.steps)
    with Spectra(written) as run:
        return RepairResult(target, len(run), len(run.events), tuple(lost))


def _readable(file: RecordFile, lost: list[str]) -> Rows:
    """All rows of a file that can be read; adds a sentence to ``lost`` for each thing that cannot."""
    layers: list[LayerRows] = []
    steps = NO_STEPS

    def tell(of: str, missing: NDArray[np.bool_], what: str) -> None:
        if missing.any():
            lost.append(f"{file.path.name}: {of}{np.count_nonzero(missing)} of {len(missing)} {what}.")

    for name in file.layers:
        try:
            index, m, n = file.shape(name)
            group = file.group(name)
            events, read = _chunks(group["events"])
        except DAMAGE:
            lost.append(f"{file.path.name}: layer {name!r}, all of it.")
            continue
        values = np.full((len(events), min(m, n)), np.nan, dtype=np.float32)
        known = np.zeros(len(events), dtype=bool)
        with contextlib.suppress(*DAMAGE):
            found, known = _chunks(group["singular_values"])
            values[known] = found[known]
        tell(f"layer {name!r}, ", ~read, "events")
        tell(f"layer {name!r}, the singular values of ", read & ~known, "events")
        layers.append(LayerRows(name, index, m, n, as_table(events[read], EVENT), values[read]))
    try:
        if "steps" in list(file.tree):
            table, read = _chunks(file.tree["steps"])
            tell("", ~read, "rows of steps")
            steps = as_table(table[read], STEP)
    except DAMAGE:
        lost.append(f"{file.path.name}: the table of steps, all of it.")
    return Rows(tuple(layers), steps)


def _chunks(dataset: Any) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Rows chunk by chunk, and which of them could be read."""
    values = np.zeros(dataset.shape, dtype=dataset.dtype)
    read = np.zeros(len(values), dtype=bool)
    chunks = getattr(dataset, "chunks", None)
    step = chunks[0] if chunks else max(1, len(values))
    for start in range(0, len(values), step):
        with contextlib.suppress(*DAMAGE):
            values[start : start + step] = dataset[start : start + step]
            read[start : start + step] = True
    return values, read
