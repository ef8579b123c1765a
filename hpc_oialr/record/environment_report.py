"""What a run ran on: versions, machine, code, job. Written beside every run and shown by ``oialr info``."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import h5py
import torch

from hpc_oialr.commands import run_command
from hpc_oialr.distributed.environment import node_name, recorded_variables, usable_cores

_PACKAGES = ("hpc_oialr", "torch", "numpy", "h5py", "transformers", "deepspeed", "mpi4py", "submitit", "timm")
_SOURCE = Path(__file__).resolve().parents[1]


def environment_report() -> dict[str, Any]:
    """Versions, hardware, source and job, as plain values fit for JSON.

    What is not there is None. Variables whose name hints at a secret are left out.
    """
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    found = [torch.cuda.get_device_properties(index) for index in gpus]
    mpi = (_output(("mpirun", "--version")) or "").strip().splitlines()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "libraries": {
            "cuda": torch.version.cuda,
            "nccl": _nccl(),
            "mpi": mpi[0].strip() if mpi else None,
            "hdf5": h5py.version.hdf5_version,
        },
        "machine": {
            "node": node_name(),
            "system": platform.platform(),
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "usable_cores": usable_cores(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        },
        "gpus": [{"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)} for gpu in found],
        "git": _git(),
        "variables": recorded_variables(),
    }


def _version(package: str) -> str | None:
    # Asked of the installed files: importing DeepSpeed only to know its version takes seconds.
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _nccl() -> str | None:
    if not torch.cuda.is_available():
        return None
    try:
        return ".".join(str(part) for part in torch.cuda.nccl.version())
    except (AttributeError, RuntimeError):
        return None


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or None)


def _git(source: Path = _SOURCE) -> dict[str, Any] | None:
    """Commit of the source tree, and whether files differ from it; None if it is no checkout."""
    git = ("git", "-C", str(source))
    # An environment inside somebody else's checkout is not that checkout's code.
    if _output((*git, "ls-files", "--error-unmatch", "errors.py")) is None:
        return None
    commit = _output((*git, "rev-parse", "HEAD"))
    changes = _output((*git, "status", "--porcelain", "--untracked-files=no"))
    return {"commit": commit and commit.strip(), "dirty": bool(changes)}


def _output(command: Sequence[str]) -> str | None:
    """What a program says, None if it is missing, fails or hangs."""
    answer = run_command(command, timeout_s=10)
    return answer.stdout if answer.code == 0 else None
