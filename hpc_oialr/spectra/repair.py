"""What can be saved of a damaged record."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_oialr.errors import DataError
from hpc_oialr.outputs import claim
from hpc_oialr.spectra.files import gaps_in, head_of, record_files, side_files, side_path
from hpc_oialr.spectra.hdf5_io import write_record, written_by
from hpc_oialr.spectra.reader import Spectra
from hpc_oialr.spectra.record_file import DAMAGE, RecordFile
from hpc_oialr.spectra.rows import LayerRows, Rows, together
from hpc_oialr.spectra.schema import EVENT, NO_STEPS, STEP, as_table


@dataclass(frozen=True)
class RepairResult:
    """What :func:`repair` did.

    Attributes
    ----------
    target
        The file that it wrote.
    layers, events
        How many layers, and how many rows of events of all layers together, it holds.
    lost
        One sentence for each thing that could not be read.
    """

    target: Path
    layers: int
    events: int
    lost: tuple[str, ...]


def repair(path: Path | str, target: Path | None = None, *, force: bool = False) -> RepairResult:
    """Write all rows that can be read into a new file; existing files stay as they are.

    Each chunk of a table has a checksum, and so has each of HDF5's own blocks: what is read is right. A chunk of
    singular values that is lost leaves its events, with NaN. A file that cannot be opened is lost as a whole.

    Parameters
    ----------
    path
        A run's folder, its ``spectra.h5`` with all segments, or one segment.
    target
        What to write; default the path with ``.repaired.h5`` behind.
    force
        Replace a file that is no repaired record; see :func:`hpc_oialr.outputs.claim`.

    Raises
    ------
    DataError
        If nothing can be read.
    OutputError
        If the target is another file than an earlier repaired record.
    """
    path = Path(path)
    head = head_of(path)
    alone = path != head and not path.is_dir()
    paths = [path] if alone else [*record_files(head), *side_files(side_path(head))]
    target = target or (path if alone else head).with_name(f"{(path if alone else head).name}.repaired.h5")
    written = claim(target, written_by("oialr spectra repair"), inputs=[*paths, head.parent], force=force)
    found = [DamagedFile(each) for each in paths]
    rows = together([file.rows() for file in found])
    counted = int(found[0].attributes.get("segments", 0)) if found else 0
    lost = [f"{gap.name}: it is missing." for gap in ([] if alone else gaps_in(paths, counted))]
    lost += [sentence for file in found for sentence in file.lost]
    if not rows:
        raise DataError(f"nothing of {head} can be saved: {' '.join(lost) or 'there is no such file.'}")
    attributes: dict[str, Any] = {}
    for file in reversed(found):
        attributes |= file.attributes
    write_record(written, {**attributes, "written_by": "oialr spectra repair"}, rows.layers, rows.steps)
    with Spectra(written) as saved:
        return RepairResult(target, len(saved), len(saved.events), tuple(lost))


@dataclass
class DamagedFile:
    """One file of a damaged record.

    Attributes
    ----------
    lost
        Sentences, once :meth:`rows` has read it.
    attributes
        Of the root, if it can be opened.
    """

    path: Path
    lost: list[str] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)

    def rows(self) -> Rows:
        """All rows that can be read."""
        try:
            file = RecordFile(self.path)
        except DataError as error:
            self.lost.append(f"{self.path.name}: all of it ({error.__cause__ or error}).")
            return Rows()
        with contextlib.closing(file):
            self.attributes = file.attributes
            return Rows(tuple(self._layers(file)), self._steps(file))

    def _layers(self, file: RecordFile) -> Iterator[LayerRows]:
        for name in file.layers:
            try:
                index, m, n = file.shape(name)
                group = file.group(name)
                events, read = _chunks(group["events"])
            except DAMAGE:
                self.lost.append(f"{self.path.name}: layer {name!r}, all of it.")
                continue
            values = np.full((len(events), min(m, n)), np.nan, dtype=np.float32)
            known = np.zeros(len(events), dtype=bool)
            with contextlib.suppress(*DAMAGE):
                found, known = _chunks(group["singular_values"])
                values[known] = found[known]
            self._tell(f"layer {name!r}, ", ~read, "events")
            self._tell(f"layer {name!r}, the singular values of ", read & ~known, "events")
            yield LayerRows(name, index, m, n, as_table(events[read], EVENT), values[read])

    def _steps(self, file: RecordFile) -> NDArray[np.void]:
        try:
            if file.attributes.get("virtual") or "steps" not in file.tree:
                return NO_STEPS
            steps, read = _chunks(file.tree["steps"])
        except DAMAGE:
            self.lost.append(f"{self.path.name}: the table of steps, all of it.")
            return NO_STEPS
        self._tell("", ~read, "rows of steps")
        return as_table(steps[read], STEP)

    def _tell(self, of: str, lost: NDArray[np.bool_], what: str) -> None:
        if lost.any():
            count = np.count_nonzero(lost)
            self.lost.append(f"{self.path.name}: {of}{count} of {len(lost)} {what}.")


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
