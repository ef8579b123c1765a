"""Lock files of a folder as HDF5 does, and write one with HDF5.

python try_hdf5.py FOLDER
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MOST_FILES = 64


def lock(path: Path) -> int:
    """Take HDF5's lock of a file and let it go; 0, or the number of the error."""
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return 0  # what may not be written is not locked for writing either
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(file, fcntl.LOCK_UN)
    except OSError as error:
        return error.errno or errno.EIO
    finally:
        os.close(file)
    return 0


def locked_files(folder: Path) -> dict[str, int | None]:
    """HDF5 files that another process has locked, and that process's number where the system tells it."""
    files = sorted([*folder.glob("*.h5"), *folder.glob("*/*.h5")])[:_MOST_FILES]
    return {str(path): holder(path) for path in files if lock(path) in (errno.EWOULDBLOCK, errno.EACCES)}


def holder(path: Path) -> int | None:
    """Who holds a lock of a file, by ``/proc/locks``."""
    status = path.stat()
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if device in words and int(words[words.index(device) - 1]) > 0:
                return int(words[words.index(device) - 1])
    return None


@contextlib.contextmanager
def room(folder: Path) -> Iterator[Path]:
    """A folder inside, removed afterwards."""
    path = Path(tempfile.mkdtemp(prefix=".oialr-doctor-", dir=folder))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def write(path: Path) -> dict[str, Any]:
    """Write a file with HDF5 and read it; its version, or what went wrong."""
    import h5py

    try:
        with h5py.File(path, "w") as file:
            file["x"] = [1.0, 2.0]
        with h5py.File(path, "r") as file:
            total = float(file["x"][:].sum())
    except (OSError, RuntimeError) as error:
        return {"hdf5": h5py.version.hdf5_version, "failed": str(error)}
    return {"hdf5": h5py.version.hdf5_version, "failed": "" if total == 3.0 else "other numbers came back"}


def main(folder: Path) -> None:
    """Locks first: they alone may hang."""
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    try:
        with room(there) as inside:
            (inside / "lock").touch()
            _say({"lock": lock(inside / "lock"), "locked": locked_files(folder)})
            _say(write(inside / "x.h5"))
    except OSError as error:
        _say({"unusable": error.strerror or str(error)})


def _say(found: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
