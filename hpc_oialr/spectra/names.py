"""Names of the files of one record."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable
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


def side_path(file: Path, folder: Path | str | None = None) -> Path:
    """Where a record, or a process's part of it, goes on when it cannot be written any more.

    Parameters
    ----------
    folder
        Default: the system's temporary folder. In it lies a folder of this user's only.
    """
    where = file.resolve()
    return _side_folder(folder) / f"{_plain(where.parent.name)}-{_plain(file.stem)}-{_mark(where.parent)}.h5"


def sides_of(head: Path, folders: Iterable[Path | str | None] = (None,)) -> dict[Path, Path]:
    """For the record and for each process's part of it that went on elsewhere, where that is."""
    pattern = re.compile(
        rf".*-{re.escape(_plain(head.stem))}(?:\.p(\d{{4,}}))?-{_mark(head.resolve().parent)}\.h5"
    )
    found: dict[Path, Path] = {}
    for folder in (_side_folder(folder) for folder in folders):
        for path in sorted(_listed(folder)) if own(folder) else []:
            match = pattern.fullmatch(path.name)
            if match and own(path):
                found[part_path(head, int(match[1])) if match[1] else head] = path
    return found


def _side_folder(folder: Path | str | None) -> Path:
    base = Path(folder) if folder is not None else Path(tempfile.gettempdir())
    return base / f"oialr-spectra-{os.getuid()}"


def _mark(folder: Path) -> str:
    return hashlib.sha256(str(folder).encode()).hexdigest()[:12]


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


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


def identity(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is replaced; None for none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def files_of(head: Path) -> list[Path]:
    """All files that may hold rows of a record, whatever state they are in."""
    if is_segment(head):
        return [head] if head.exists() else []
    heads = [head, *parts_of(head), *sides_of(head).values()]
    found = [path for each in heads for path in (*segments_of(each).values(), each)]
    return [path for path in found if path.exists()]
