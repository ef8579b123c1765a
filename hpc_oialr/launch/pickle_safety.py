"""Reading a pickle runs its code: only pickles that nobody else can have written are read."""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path

from hpc_oialr.errors import OIALRError

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS_ENTER = stat.S_IXGRP | stat.S_IXOTH


def require_own(folder: Path, *files: Path) -> None:
    """Raise :class:`OIALRError` if a folder, or a file in it, belongs to another user or is writable by others."""
    user = os.geteuid()
    # Files in a folder that others cannot enter are safe whatever their mode.
    closed = {folder} if not folder.stat().st_mode & _OTHERS_ENTER else {folder, *files}
    for path in (folder, *files):
        status = path.stat()
        if status.st_uid != user:
            raise OIALRError(
                f"{path} belongs to user {status.st_uid}; pickles are read only from what belongs to you (user {user}), "
                "since reading one runs its code. Submit the run into a folder of your own."
            )
        if path in closed and status.st_mode & _OTHERS_WRITE:
            raise OIALRError(
                f"{path} has mode {stat.S_IMODE(status.st_mode):04o}; pickles are read only where nobody else can "
                f"write, since reading one runs its code. If you trust what is there: chmod go-w {shlex.quote(str(path))}"
            )
