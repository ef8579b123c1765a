"""Errors of the operating system as one line with the path and the fix."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from hpc_oialr.errors import DataError, HostError

_FIXES = {
    errno.EACCES: "Check the permissions of the file and of the folders above it.",
    errno.EPERM: "Check the permissions of the file and of the folders above it.",
    errno.EROFS: "Take a folder on a file system that can be written.",
    errno.ENOSPC: "Free some space, or take a folder on another file system.",
    errno.EDQUOT: "Free some of your quota, or take a folder on another file system.",
    errno.ENAMETOOLONG: "Take a shorter name.",
    errno.ENOTDIR: "A part of the path is a file; take another path.",
    errno.EISDIR: "Name a file inside it.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n), or use fewer data workers.",
    errno.ENOMEM: "Free some memory, or ask for more.",
}


def of_system(error: Exception) -> HostError | None:
    """An error of the operating system or a lack of memory in one line with path and fix; None if it is neither."""
    if isinstance(error, UnicodeDecodeError):
        return HostError(
            f"a file that must be UTF-8 text is not: byte {error.start}, {error.reason}. Name a text file."
        )
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
        lines = str(error).strip().splitlines()
        reason = f" ({lines[-1]})" if lines else ""
        return HostError(
            f"there is not enough memory for this{reason}. Take a smaller model or batch, or ask for more."
        )
    if "Symlink loop" in str(error):
        # pathlib's own error, before Python 3.13.
        return HostError(f"{error}. Correct or remove the link.")
    return _of_os(error) if isinstance(error, OSError) else None


def _of_os(error: OSError) -> HostError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) and error.filename2:
        # Of a copy, not its source.
        error.filename = error.filename2
    path = error.filename if isinstance(error.filename, (str, bytes)) else None
    if path is None:
        return HostError(f"{error.strerror or error}. {_FIXES.get(error.errno or 0, '')}".strip())
    name = os.fsdecode(path)
    if isinstance(error, FileNotFoundError) and Path(name).is_symlink():
        return HostError(
            f"{name} is a link to {Path(name).readlink()}, which does not exist. Correct or remove the link."
        )
    return HostError(f"{name}: {error.strerror}. {_FIXES.get(error.errno or 0, 'Check the path.')}")


def read_text(path: Path) -> str:
    """The text of a file; raises DataError with the path if it cannot be read or is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(str(_of_os(error))) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text (byte {error.start}: {error.reason}). Name a text file.") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file; raises DataError with the path if it cannot be read or is damaged."""
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}). Copy it again, or remove it.") from None
