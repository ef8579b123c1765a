"""Names of the files of one record."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path

_SEGMENT = re.compile(r"(?P<head>.+)\.(?P<number>\d{3,})")


def segment_path(head: Path, number: int) -> Path:
    """The closed segment of this number, from 1 on, beside the head.

    Examples
    --------
    >>> segment_path(Path("run/spectra.h5"), 7).as_posix()
    'run/spectra.h5.007'
    """
    return head.with_name(f"{head.name}.{number:03d}")


def is_segment(path: Path) -> bool:
    """Whether a file is a closed segment of another one."""
    return _SEGMENT.fullmatch(path.name) is not None


def segments_of(head: Path) -> dict[int, Path]:
    """All closed segments that lie beside a head, also ones that it does not count any more, by number."""
    matches = (_SEGMENT.fullmatch(path.name) for path in _listed(head.parent))
    numbers = sorted(int(match["number"]) for match in matches if match and match["head"] == head.name)
    return {number: segment_path(head, number) for number in numbers}


def part_path(head: Path, rank: int) -> Path:
    """The file of one process's layers.

    Examples
    --------
    >>> part_path(Path("run/spectra.h5"), 3).as_posix()
    'run/spectra.p0003.h5'
    """
    return head.with_name(f"{head.stem}.p{rank:04d}{head.suffix}")


def parts_of(head: Path) -> list[Path]:
    """The files of processes that lie beside a head, by rank, each by its head's name, be it there or not."""
    pattern = re.compile(rf"{re.escape(head.stem)}\.p(\d{{4,}}){re.escape(head.suffix)}(\.\d{{3,}})?")
    found = (pattern.fullmatch(path.name) for path in _listed(head.parent))
    return [part_path(head, rank) for rank in sorted({int(match[1]) for match in found if match})]


def _listed(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def side_path(head: Path, folder: Path | str | None = None) -> Path:
    """Where a record goes on that cannot be written any more.

    A folder of this user's only, in ``folder`` or the system's temporary folder; the file's name tells the run's.
    """
    where = head.resolve()
    mark = hashlib.sha256(str(where).encode()).hexdigest()[:12]
    name = re.sub(r"[^\w.-]", "_", f"{where.parent.name}-{head.stem}")
    base = Path(folder) if folder is not None else Path(tempfile.gettempdir())
    return base / f"oialr-spectra-{os.getuid()}" / f"{name}-{mark}.h5"


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
