"""Pickles run code when they are read: only those are that nobody else can have written."""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path

from hpc_oialr.errors import OIALRError

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS_ENTER = stat.S_IXGRP | stat.S_IXOTH


def require_own(folder: Path, *files: Path) -> None:
    """Check a folder, and files in it, before pickles there are read.

    Raises
    ------
    OIALRError
        If one belongs to another user, or others may write it.
    """
    for path in (folder, *files):
        _require_owner(path)
    _require_closed(folder)
    if folder.stat().st_mode & _OTHERS_ENTER:
        for file in files:
            _require_closed(file)


def _require_owner(path: Path) -> None:
    owner, user = path.stat().st_uid, os.geteuid()
    if owner != user:
        raise OIALRError(
            f"{path} belongs to user {owner}; pickles are read only from what belongs to you (user {user}), since "
            "reading one runs its code. Submit the run into a folder of your own."
        )


def _require_closed(path: Path) -> None:
    mode = path.stat().st_mode
    if mode & _OTHERS_WRITE:
        raise OIALRError(
            f"{path} has mode {stat.S_IMODE(mode):04o}; pickles are read only where nobody else can write, since "
            f"reading one runs its code. If you trust what is there: chmod go-w {shlex.quote(str(path))}"
        )
