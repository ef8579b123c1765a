"""Which files make up a record, and what they are called.

The record of ``runs/first`` is ``runs/first/spectra.h5`` once the run has ended. Until then it is a chain of files
with consecutive numbers, each of which holds the rows written after those of the one before::

    spectra.h5, spectra.h5.001, spectra.h5.002        HDF5, number 0, 1, 2: many flushes joined
    spectra.h5.003.npz, spectra.h5.004.npz, ...       one flush each, not joined yet

A file is written under a temporary name, then renamed, and never changed in place. A kill between the join of some
files and their removal leaves rows twice; readers take each row once. Files of processes (``spectra.p0003.h5``), which
earlier versions could write, are read as further chains of the same record.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

_NAME = re.compile(r"(?P<head>.+?)(?:\.(?P<number>\d{3,})(?:\.npz)?)?")


def head_of(path: Path) -> Path:
    """The ``spectra.h5`` of a run's folder, of one of its segments, or the path itself.

    Examples
    --------
    >>> head_of(Path("run/spectra.h5.007")).as_posix()
    'run/spectra.h5'
    """
    if path.is_dir():
        return path / "spectra.h5"
    return path.with_name(_parts(path)[0])


def number_of(path: Path) -> int:
    """A file's number in its chain; 0 for the head."""
    return int(_parts(path)[1])


def is_flush(path: Path) -> bool:
    """Whether a file holds one flush, as NumPy's ``.npz``."""
    return path.suffix == ".npz"


def segment_path(head: Path, number: int, *, flush: bool = False) -> Path:
    """The file of this number.

    Examples
    --------
    >>> [segment_path(Path("spectra.h5"), n).name for n in (0, 7)], segment_path(Path("spectra.h5"), 0, flush=True).name
    (['spectra.h5', 'spectra.h5.007'], 'spectra.h5.000.npz')
    """
    if flush:
        return head.with_name(f"{head.name}.{number:03d}.npz")
    return head.with_name(f"{head.name}.{number:03d}") if number else head


def chain_of(head: Path) -> list[Path]:
    """All files of one chain, oldest rows first; a joined file comes before the flush of its number."""
    found = [path for path in _listed(head.parent) if _parts(path)[0] == head.name and path.is_file()]
    return sorted(found, key=lambda path: (number_of(path), is_flush(path)))


def record_files(head: Path) -> list[Path]:
    """All files of a record that lie beside its head: its chain, then those of processes."""
    names = sorted({_parts(path)[0] for path in _listed(head.parent)})
    part = re.compile(rf"{re.escape(head.stem)}\.p\d{{4,}}{re.escape(head.suffix)}")
    heads = [head, *(head.with_name(name) for name in names if part.fullmatch(name))]
    return [path for each in heads for path in chain_of(each)]


def gaps_in(paths: Sequence[Path], least: int = 0) -> list[Path]:
    """Files that must have been there, for each chain of which one is; the first chain has number ``least`` too."""
    missing = []
    for head in dict.fromkeys(map(head_of, paths)):
        numbers = {number_of(path) for path in paths if head_of(path) == head}
        missing += [segment_path(head, n) for n in range(max(*numbers, least) + 1) if n not in numbers]
        least = 0
    return missing


def _parts(path: Path) -> tuple[str, str]:
    found = _NAME.fullmatch(path.name)
    return (found["head"], found["number"] or "0") if found else (path.name, "0")


def _listed(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def side_path(head: Path, folder: Path | str | None = None) -> Path:
    """The head of the chain that continues a record whose own folder cannot be written.

    Parameters
    ----------
    folder
        Default: the system's temporary folder. In it lies a folder of this user's only.
    """
    where, base = head.resolve(), Path(folder) if folder is not None else Path(tempfile.gettempdir())
    mark = hashlib.sha256(str(where.parent).encode()).hexdigest()[:12]
    name = re.sub(r"[^\w.-]", "_", f"{where.parent.name}-{head.stem}")
    return base / f"oialr-spectra-{os.getuid()}" / f"{name}-{mark}.h5"


def side_files(side: Path) -> list[Path]:
    """Files of a chain in a side folder that this user owns."""
    return [path for path in chain_of(side) if own(path)] if own(side.parent) else []


def make_side_folder(side: Path) -> None:
    """Make the folder of a side file, for this user only.

    Raises
    ------
    OSError
        If it belongs to somebody else, who could put files or links there.
    """
    side.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not own(side.parent):
        raise OSError(f"{side.parent} belongs to another user; it must be this user's own")


def own(path: Path) -> bool:
    """Whether a file or folder is there, no link, and this user's."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return status.st_uid == os.getuid() and not path.is_symlink()
