"""A record in many files made one, by hand."""

from __future__ import annotations

import functools
from pathlib import Path

from hpc_oialr.errors import DataError
from hpc_oialr.spectra.join import write_record
from hpc_oialr.spectra.master import write_master
from hpc_oialr.spectra.names import identity, parts_of, segments_of, sides_of
from hpc_oialr.spectra.pieces import side_folders
from hpc_oialr.spectra.reader import Spectra

_TRIES = 5


def merge(path: Path | str, *, copy: bool = False) -> Path:
    """Join a record's segments and side files; the path of the file through which all of it is seen.

    What a run does at its end, for one that was stopped, or whose disk was full. A run that goes on meanwhile is
    not disturbed.

    Parameters
    ----------
    path
        A run's folder or its ``spectra.h5``.
    copy
        Join the files of all processes too, instead of a head that points to them.

    Raises
    ------
    DataError
        If a file is damaged; all stay as they are.
    OSError
        If there is no room; all stay as they are.
    """
    path = Path(path)
    head = path / "spectra.h5" if path.is_dir() else path
    with Spectra(head) as run:
        sides = sides_of(head, side_folders(run.pieces))
    parts = sorted({*parts_of(head), *(file for file in sides if file != head)})
    if not parts or copy:
        _join_all(head, parts)
        return head
    for part in parts:
        _join_all(part, [])
    write_master(head)
    return head


def _join_all(head: Path, parts: list[Path]) -> None:
    """Everything into the head; what another process has written meanwhile is not lost."""
    for _ in range(_TRIES):
        unless = functools.partial(_changed, head, identity(head))
        with Spectra(head) as run:
            files = {piece.path for piece in run.pieces} - {head}
            if not files or write_record(run, head, unless=unless):
                break
    else:
        raise DataError(f"{head} is being written again and again; merge it when the run has stopped.")
    for each in [head, *parts]:
        files.update(segments_of(each).values())
    for file in files:
        file.unlink(missing_ok=True)


def _changed(head: Path, before: tuple[int, int, int] | None) -> bool:
    return identity(head) != before
