"""Try what may hang or kill a process: ``python -P probe.py cuda|folder|hdf5|mpi ARGUMENT``.

It runs in an interpreter of its own, as a plain file: nothing of this package is imported, and torch only where it is
needed. Findings are printed as JSON objects, one a line, as far as it gets.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

_ONES = 2**20
_BLOCK = 2**20


def say(**found: Any) -> None:
    """Print findings at once, since the next step may hang."""
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


def cuda(local_rank: str) -> None:
    """Start CUDA, compute on this process's GPU, and let NCCL sum over one process."""
    version = ctypes.c_int(0)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    # The newest CUDA that the driver supports, e.g. 12080 for 12.8.
    say(driver_cuda=version.value or None)
    import torch

    try:
        torch.cuda.init()
        error = ""
    except (RuntimeError, AssertionError) as failed:
        error = str(failed).strip().splitlines()[0]
    count = torch.cuda.device_count() if not error else 0
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    say(torch=torch.__version__, torch_cuda=torch.version.cuda, error=error, names=names)
    # One visible GPU is this process's own, whatever its local rank.
    index = int(local_rank) if count > 1 else 0
    if index >= count:
        return
    free, total = torch.cuda.mem_get_info(index)
    right = torch.ones(_ONES, device=f"cuda:{index}").sum().item() == _ONES
    say(index=index, free=free, total=total, right=right)
    dist: Any = importlib.import_module("torch.distributed")
    if not dist.is_nccl_available():
        say(nccl=None)
        return
    torch.cuda.set_device(index)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    ones = torch.ones(_ONES, device=f"cuda:{index}")
    dist.all_reduce(ones)
    say(nccl=".".join(map(str, torch.cuda.nccl.version())), reduced=ones.sum().item() == _ONES)


def mpi(what: str) -> None:
    """Load MPI, and "start" it if asked to; a wrong PMI may end or hang this process."""
    try:
        mpi4py: Any = importlib.import_module("mpi4py")
    except ImportError as error:
        return say(missing="mpi4py", error=str(error))
    say(mpi4py=str(mpi4py.__version__))
    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    try:
        module: Any = importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        return say(missing="library", error=str(error).strip().splitlines()[0])
    lines = str(module.Get_library_version()).strip().splitlines()
    say(library=" ".join(lines[0].split(",")[0].split()) if lines else "unknown")
    if what == "start":
        module.Init_thread(module.THREAD_FUNNELED)
        say(rank=module.COMM_WORLD.rank, size=module.COMM_WORLD.size)
        module.Finalize()
        say(ended=True)
    return None


def _scratch(folder: Path) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix=".oialr-doctor-", dir=folder, ignore_cleanup_errors=True)


def folder(where: str) -> None:
    """Look at a folder, or its nearest parent that exists; write, rename over an old file, read back, as a run does."""
    wanted = Path(where)
    there = next(each for each in (wanted, *wanted.parents) if each.exists())
    if not there.is_dir():
        return say(there=str(there), step="find", errno=0, error=f"{there} is no folder")
    space = os.statvfs(there)
    say(
        there=str(there),
        free_bytes=space.f_bavail * space.f_frsize,
        inodes=space.f_files,
        free_inodes=space.f_favail,
        owner=there.stat().st_uid,
    )
    step = "make a folder"
    # Random bytes, which no file system compresses away.
    content = os.urandom(_BLOCK)
    try:
        with _scratch(there) as name:
            inside, step = Path(name), "write"
            for path, data in ((inside / "old", b"old"), (inside / "new", content)):
                with path.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            step = "rename"
            (inside / "new").replace(inside / "old")
            step = "read back"
            if (inside / "old").read_bytes() != content or (inside / "new").exists():
                return say(step="rename", errno=0, error="the old file is still there")
    except OSError as error:
        return say(step=step, errno=error.errno or 0, error=error.strerror or str(error))
    return say(works=True)


def hdf5(path: str) -> None:
    """Lock a file as HDF5 does, and write one with HDF5; the lock first: it alone may hang."""
    wanted = Path(path)
    there = next(each for each in (wanted, *wanted.parents) if each.is_dir())
    try:
        with _scratch(there) as name:
            inside = Path(name)
            say(lock=lock(inside / "lock"))
            import h5py

            try:
                with h5py.File(inside / "x.h5", "w") as file:
                    file["x"] = [1.0, 2.0]
                with h5py.File(inside / "x.h5", "r") as file:
                    failed = "" if float(file["x"][:].sum()) == 3.0 else "other numbers came back"
            except (OSError, RuntimeError) as error:
                failed = str(error)
            say(hdf5=h5py.version.hdf5_version, failed=failed)
    except OSError as error:
        say(unusable=error.strerror or str(error))


def lock(path: Path) -> int:
    """Take and release HDF5's lock of a new file; 0, or the number of the error."""
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_UN)
        except OSError as error:
            return error.errno or errno.EIO
    return 0


if __name__ == "__main__":
    {"cuda": cuda, "folder": folder, "hdf5": hdf5, "mpi": mpi}[sys.argv[1]](sys.argv[2])
