"""Limits of the system: open files, locked memory, shared memory."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from hpc_oialr.doctor.context import CheckContext
from hpc_oialr.doctor.finding import Finding, note, ok, problem

_INFINIBAND, _SHARED = Path("/sys/class/infiniband"), Path("/dev/shm")
_FILES, _FILES_A_PROCESS = 256, 4
# Below these InfiniBand cannot register its buffers, and a container's default of 64 MiB starves NCCL.
_LOCKED_GIB, _SHARED_GIB = 1.0, 0.25
_GIB = 2**30


def check_limits(context: CheckContext) -> list[Finding]:
    """All of them."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    findings = [judge_files(files, context.size)]
    if _INFINIBAND.exists() and any(_INFINIBAND.iterdir()):
        findings.append(judge_locked(locked))
    if context.first_of_node and _SHARED.exists():
        space = os.statvfs(_SHARED)
        findings.append(judge_shared(context, space.f_blocks * space.f_frsize))
    return findings


def judge_files(limit: int, processes: int) -> Finding:
    """Open files: process 0 holds connections to all others."""
    need = _FILES + _FILES_A_PROCESS * processes
    if limit == resource.RLIM_INFINITY or limit >= need:
        return ok("open files", "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}")
    return problem("open files", f"{limit:,}; {processes:,} processes need {need:,}", f"ulimit -n {need}")


def judge_locked(limit: int) -> Finding:
    """Locked memory, in bytes: InfiniBand's buffers."""
    if limit == resource.RLIM_INFINITY or limit >= _LOCKED_GIB * _GIB:
        return ok("locked memory", "enough for InfiniBand")
    fix = "ulimit -l unlimited   (where forbidden: the administrators, PropagateResourceLimitsExcept=MEMLOCK)"
    return problem("locked memory", f"{limit // 1024:,} KiB; InfiniBand needs it unlimited", fix)


def judge_shared(context: CheckContext, size: int) -> Finding:
    """Shared memory, in bytes: NCCL's and data loaders'."""
    if size >= _SHARED_GIB * _GIB:
        return ok("/dev/shm", f"{size / _GIB:,.1f} GiB")
    found = f"{size / 2**20:,.0f} MiB: too little for NCCL and the workers of data loaders"
    fix = "docker run --shm-size=8g, or NCCL_SHM_DISABLE=1"
    needed = context.local_size > 1 or context.gpus_asked
    return problem("/dev/shm", found, fix) if needed else note("/dev/shm", found, fix)
