"""Use a folder as a run does: write, rename over an old file, read back, remove.

python try_folder.py FOLDER
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

_BLOCK = 2**20


def look(folder: Path) -> dict[str, Any]:
    """What the folder is, or its nearest parent that exists."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        return {"there": str(there), "step": "find", "errno": 0, "error": f"{there} is no folder"}
    space, status = os.statvfs(there), there.stat()
    return {
        "there": str(there),
        "exists": there == folder,
        "holds_run": (folder / "config.yaml").exists(),
        "free_bytes": space.f_bavail * space.f_frsize,
        "inodes": space.f_files,
        "free_inodes": space.f_favail,
        "owner": status.st_uid,
        "mode": status.st_mode & 0o7777,
    }


def use(there: Path) -> dict[str, Any]:
    """Which step fails, with its error; nothing if none does."""
    step, room = "make a folder", None
    try:
        room = Path(tempfile.mkdtemp(prefix=".oialr-doctor-", dir=there))
        step = "write"
        # Random bytes, which no file system compresses away.
        content = os.urandom(_BLOCK)
        _write(room / "old", b"old")
        _write(room / "new", content)
        step = "rename"
        (room / "new").replace(room / "old")
        step = "read back"
        if (room / "old").read_bytes() != content or (room / "new").exists():
            return {"step": "rename", "errno": 0, "error": "the old file is still there"}
    except OSError as error:
        return {"step": step, "errno": error.errno or 0, "error": error.strerror or str(error)}
    finally:
        if room is not None:
            shutil.rmtree(room, ignore_errors=True)
    return {"works": True}


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def main(folder: Path) -> None:
    """Look, then use."""
    found = look(folder)
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    if "step" not in found:
        sys.stdout.write(json.dumps(use(Path(found["there"]))) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
