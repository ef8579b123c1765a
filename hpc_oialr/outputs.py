"""What a command may overwrite: its own earlier output, and with ``--force`` one named file; nothing else.

Every ``--out`` is checked here before any work is done. A command's own earlier output is known by its content, never
by its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hpc_oialr.errors import OIALRError

# Lists the files of a folder that a command wrote, each with its sha256.
MARKER = "written_by_oialr.json"
_LOOK = 65_536


class OutputError(OIALRError):
    """An output would destroy what the command did not write."""


@dataclass(frozen=True)
class Kind:
    """A kind of output file."""

    title: str  # e.g. "a report page"; completes "X exists and is not ..."
    is_own: Callable[[Path], bool]  # whether a file is an earlier output of this kind


def marked(title: str, *beginnings: bytes, mark: bytes) -> Kind:
    """Files that begin in one of some ways, with a mark near their beginning or end."""

    def is_own(path: Path) -> bool:
        with path.open("rb") as file:
            head = file.read(_LOOK)
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOOK))
            return head.startswith(beginnings) and (mark in head or mark in file.read())

    return Kind(title, is_own)


def claim(path: Path | str, kind: Kind, *, inputs: Sequence[Path | str] = (), force: bool | None = False) -> Path:
    """The file to write for an output path; raises :class:`OutputError` if that would destroy something.

    Links are followed. ``inputs`` are files and folders that are read: they and their contents are never overwritten,
    except an earlier output of the same kind. ``force`` replaces this one file, but no input, no folder and no device;
    None where there is no such option.
    """
    target = resolved(path)
    if not target.exists():
        return target
    if target.is_dir():
        raise OutputError(f"{path} is a folder, and the output is one file. Name a file in it.")
    if not target.is_file():
        raise OutputError(f"{path} is no regular file but a device or a pipe. Name a file.")
    for each in map(Path, inputs):
        if each.is_file() and each.samefile(target):
            raise OutputError(f"{path} is {each}, which is read here. Name another file for the output.")
    if kind.is_own(target):
        return target
    holder = _holder(target, inputs)
    if holder is not None:
        raise OutputError(
            f"{path} belongs to {holder}, which is read here, and is not {kind.title}. Name another file for the "
            "output."
        )
    if not force:
        instead = "" if force is None else ", or replace this one: --force"
        raise OutputError(
            f"{path} exists and is not {kind.title} written by oialr. Name another file for the output{instead}"
        )
    return target


def _holder(target: Path, inputs: Sequence[Path | str]) -> Path | None:
    """The input folder that holds a file, also under another name (a hard link)."""
    found = target.stat()
    for folder in (each for each in map(Path, inputs) if each.is_dir()):
        if target.is_relative_to(folder.resolve()):
            return folder
        if found.st_nlink > 1 and any(file.is_file() and file.samefile(target) for file in folder.rglob("*")):
            return folder
    return None


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the output in the error of a write, also of safetensors, whose error is no OSError."""
    try:
        yield
    except Exception as error:
        failed = re.search(r"\(os error (\d+)\)", str(error))
        if failed and not isinstance(error, OSError):
            raise OSError(int(failed[1]), os.strerror(int(failed[1])), str(path)) from error
        if type(error) is OSError and error.errno and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A temporary name beside ``target``; what is written there replaces it at the end, at once.

    After an error nothing is left. The name keeps the suffix, by which some libraries choose the format.
    """
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        draft = Path(scratch) / f"new{target.suffix}"
        with _named(target):
            yield draft
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        draft.replace(target)


@contextmanager
def new_folder(
    path: Path | str, command: str, *, inputs: Sequence[Path | str] = (), force: bool = False
) -> Iterator[Path]:
    """An empty folder to write files into; at the end they are moved into ``path``, whose other files stay.

    ``path`` must be new, empty, or hold only what the same ``command`` (e.g. "oialr export") wrote there and nobody has
    changed, and may lie in ``inputs``, folders that are read, only then. ``force`` writes into a folder with other
    content: files of the same names are replaced. Raises :class:`OutputError` before anything is written.
    """
    target = resolved(path)
    earlier = _check_folder(path, target, command, inputs=inputs, force=force)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        draft = Path(scratch) / "new"
        draft.mkdir()
        with _named(target):
            yield draft
        names = sorted(each.name for each in draft.iterdir())
        marker = {"written_by": command, "files": {name: sha256_of(draft / name) for name in names}}
        (draft / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
        if not target.exists():
            draft.replace(target)
            return
        for name in (*names, MARKER):
            (draft / name).replace(target / name)
        for name in set(earlier) - set(names):
            (target / name).unlink(missing_ok=True)


def _check_folder(
    path: Path | str, target: Path, command: str, *, inputs: Sequence[Path | str], force: bool
) -> Sequence[str]:
    """Names of the files there that the command wrote before."""
    if not target.exists():
        return ()
    if not target.is_dir():
        raise OutputError(f"{path} is a file, and the output is a folder. Name a new folder.")
    try:
        marker = json.loads((target / MARKER).read_text(encoding="utf-8"))
        found = marker["files"].items() if marker["written_by"] == command else ()
        listed = {str(name): str(sha) for name, sha in found if name == Path(name).name}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        listed = {}
    files = {name: target / name for name in listed if (target / name).is_file()}
    own = [name for name, file in files.items() if sha256_of(file) == listed[name]]
    others = sorted({each.name for each in target.iterdir()} - {*own, *((MARKER,) if listed else ())})
    if not others:
        return own
    some = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
    for folder in (each for each in map(Path, inputs) if each.is_dir()):
        if target.is_relative_to(folder.resolve()):
            where = "is" if target == folder.resolve() else "lies in"
            raise OutputError(f"{path} {where} {folder}, which is read here, and holds {some}. Name a new folder.")
    if not force:
        raise OutputError(
            f"{path} holds what {command} did not write: {some}. Name a new folder, or replace files of the same "
            "names there, and no others: --force"
        )
    return own


def require_absent(folder: Path, names: Sequence[str], what: str) -> None:
    """Raise :class:`OutputError` if a folder holds one of the names that ``what``, e.g. "a run", will write there."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file, and {what} needs a folder. Name a new folder: --out")
    for name in names:
        there = folder / name
        if os.path.lexists(there) and not (there.is_dir() and not any(there.iterdir())):
            raise OutputError(
                f"{there} exists already, and {what} would write over it. Name a new folder: --out; or move it "
                f"away: mv {shlex.quote(str(there))} ELSEWHERE"
            )


def resolved(path: Path | str) -> Path:
    """The path with links followed; raises :class:`OutputError` for a circle of links."""
    try:
        target = Path(path).resolve()
    except (OSError, RuntimeError) as error:
        raise OutputError(f"{path} cannot be followed ({error}). Name another output.") from None
    # From Python 3.13 on, resolve() returns a circle of links as it is.
    if target.is_symlink():
        raise OutputError(f"{path} is a link that leads back to itself. Name another output.")
    return target


def sha256_of(path: Path) -> str:
    """Checksum of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
