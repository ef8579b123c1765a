"""What can be saved of a damaged record."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_oialr.errors import DataError
from hpc_oialr.outputs import claim
from hpc_oialr.spectra.files import gaps_in, head_of, record_files, write_record, written_by
from hpc_oialr.spectra.reader import Spectra
from hpc_oialr.spectra.record_file import DAMAGE, RecordFile
from hpc_oialr.spectra.schema import EVENT, NO_STEPS, STEP, LayerRows, Rows, as_table, together


@dataclass(frozen=True)
class RepairResult:
    """What :func:`repair` did."""

    target: Path  # what it wrote
    layers: int
    events: int  # of all layers together
    lost: tuple[str, ...]  # one sentence for each thing that could not be read


def repair(path: Path | str, target: Path | None = None, *, force: bool = False) -> RepairResult:
    """Write all rows that can be read into a new file; existing files stay as they are.

    Each chunk of a table has a checksum, and so has each of HDF5's own blocks: what is read is right. A chunk of
    singular values that is lost leaves its events, with NaN. A file that cannot be opened is lost as a whole.

    ``path`` is a run's folder, its ``spectra.h5`` with all segments, or one segment; ``target`` by default the path
    with ``.repaired.h5`` behind. ``force``: replace a file that is no repaired record. DataError if nothing can be read.
    """
    path = Path(path)
    head = head_of(path)
    alone = path != head and not path.is_dir()
    paths = [path] if alone else record_files(head)
    target = target or (path if alone else head).with_name(f"{(path if alone else head).name}.repaired.h5")
    written = claim(target, written_by("oialr spectra repair"), inputs=[*paths, head.parent], force=force)
    saved: list[Rows] = []
    lost: list[str] = []
    attributes: dict[str, Any] = {}
    counted = 0
    for each in paths:
        try:
            file = RecordFile(each)
        except DataError as error:
            lost.append(f"{each.name}: all of it ({error.__cause__ or error}).")
            continue
        with contextlib.closing(file):
            # Those of the oldest file count.
            attributes = {**file.attributes, **attributes}
            rows, lost_here = _readable(file)
        saved.append(rows)
        lost += lost_here
        if each == paths[0]:
            # The head of an earlier version counts its segments.
            counted = int(file.attributes.get("segments", 0))
    if not alone:
        lost = [f"{gap.name}: it is missing." for gap in gaps_in(paths, counted)] + lost
    rows = together(saved)
    if not rows:
        raise DataError(f"nothing of {head} can be saved: {' '.join(lost) or 'there is no such file.'}")
    write_record(written, {**attributes, "written_by": "oialr spectra repair"}, rows.layers, rows.steps)
    with Spectra(written) as run:
        return RepairResult(target, len(run), len(run.events), tuple(lost))


def _readable(file: RecordFile) -> tuple[Rows, list[str]]:
    """All rows of a file that can be read, and a sentence for each thing that cannot."""
    layers: list[LayerRows] = []
    lost: list[str] = []
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
        if "steps" in file.tree and not file.attributes.get("virtual"):
            table, read = _chunks(file.tree["steps"])
            tell("", ~read, "rows of steps")
            steps = as_table(table[read], STEP)
    except DAMAGE:
        lost.append(f"{file.path.name}: the table of steps, all of it.")
    return Rows(tuple(layers), steps), lost


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
