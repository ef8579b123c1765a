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
import torch.distributed as dist

from hpc_oialr.commands import run_command
from hpc_oialr.distributed.environment import node_name, recorded_variables, usable_cores

_PACKAGES = ("hpc_oialr", "torch", "numpy", "h5py", "transformers", "deepspeed", "mpi4py", "submitit", "timm")
_SOURCE = Path(__file__).resolve().parents[1]


def environment_report() -> dict[str, Any]:
    """Versions, hardware, source and job as plain values for JSON; None for what is missing, no secrets."""
    on_gpu = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count() if on_gpu else 0)]
    mpi = (_output(("mpirun", "--version")) or "").strip().splitlines()
    nccl = torch.cuda.nccl.version() if on_gpu and dist.is_nccl_available() else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "libraries": {
            "cuda": torch.version.cuda,
            "nccl": nccl and ".".join(map(str, nccl)),
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
        "gpus": [{"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)} for gpu in gpus],
        "git": _git(),
        "variables": recorded_variables(),
    }


def _version(package: str) -> str | None:
    # From the installed files: importing DeepSpeed takes seconds.
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or None)


def _git(source: Path = _SOURCE) -> dict[str, Any] | None:
    """Commit of the source tree, and whether files differ from it; None if it is not a checkout."""
    git = ("git", "-C", str(source))
    # An installation inside another repository's checkout is not that repository's code.
    if _output((*git, "ls-files", "--error-unmatch", "errors.py")) is None:
        return None
    commit = _output((*git, "rev-parse", "HEAD"))
    changes = _output((*git, "status", "--porcelain", "--untracked-files=no"))
    return {"commit": commit and commit.strip(), "dirty": bool(changes)}


def _output(command: Sequence[str]) -> str | None:
    """A program's output; None if it is missing, fails or hangs."""
    answer = run_command(command, timeout_s=10)
    return answer.stdout if answer.code == 0 else None
