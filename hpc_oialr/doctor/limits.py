"""Threads against cores; limits of open files, locked memory and shared memory."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from hpc_oialr.distributed.environment import usable_cores
from hpc_oialr.doctor.context import CheckContext, Finding, note, ok, problem

_INFINIBAND, _SHARED = Path("/sys/class/infiniband"), Path("/dev/shm")
_FILES, _FILES_A_PROCESS = 256, 4
# With less, InfiniBand cannot register its buffers, and NCCL fails (containers have 64 MiB by default).
_LOCKED_GIB, _SHARED_GIB = 1.0, 0.25
_GIB = 2**30


def check_limits(context: CheckContext) -> list[Finding]:
    """All limits of the system."""
    findings = [open_files_finding(resource.getrlimit(resource.RLIMIT_NOFILE)[0], context.size)]
    if _INFINIBAND.exists() and any(_INFINIBAND.iterdir()):
        findings.append(locked_memory_finding(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]))
    if context.in_scope("node") and _SHARED.exists():
        space = os.statvfs(_SHARED)
        findings.append(shared_memory_finding(context, space.f_blocks * space.f_frsize))
    return findings


def open_files_finding(limit: int, processes: int) -> Finding:
    """Open files: rank 0 holds connections to all others."""
    need = _FILES + _FILES_A_PROCESS * processes
    if limit == resource.RLIM_INFINITY or limit >= need:
        return ok("open files", "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}")
    return problem("open files", f"{limit:,}; {processes:,} processes need {need:,}", f"ulimit -n {need}")


def locked_memory_finding(limit: int) -> Finding:
    """Locked memory (bytes): InfiniBand's buffers."""
    if limit == resource.RLIM_INFINITY or limit >= _LOCKED_GIB * _GIB:
        return ok("locked memory", "enough for InfiniBand")
    fix = "ulimit -l unlimited   (where forbidden: the administrators, PropagateResourceLimitsExcept=MEMLOCK)"
    return problem("locked memory", f"{limit // 1024:,} KiB; InfiniBand needs it unlimited", fix)


def shared_memory_finding(context: CheckContext, size: int) -> Finding:
    """Shared memory (bytes), of NCCL and data loaders."""
    if size >= _SHARED_GIB * _GIB:
        return ok("/dev/shm", f"{size / _GIB:,.1f} GiB")
    found = f"{size / 2**20:,.0f} MiB: too little for NCCL and the workers of data loaders"
    needed = context.local_size > 1 or context.gpus_asked
    return (problem if needed else note)("/dev/shm", found, "docker run --shm-size=8g, or NCCL_SHM_DISABLE=1")


def check_threads(context: CheckContext) -> list[Finding]:
    """OMP_NUM_THREADS against the cores of this process and of its node."""
    cores = usable_cores()
    return [threads_finding(context, cores, os.cpu_count() or 1), *binding_findings(context, cores)]


def threads_finding(context: CheckContext, cores: int, of_node: int) -> Finding:
    """Whether threads outnumber the ``cores`` that this process may use, or those of the node."""
    text, given = context.environ.get("OMP_NUM_THREADS"), _cpus_per_task(context)
    shared = f"{context.local_size} on the node share {of_node}"
    if text is None:
        return ok("threads", f"as many as cores: {cores}, {shared}")
    # Processes that are not bound see the same cores, and share them.
    fair = min(given, cores) if given else max(1, min(cores, of_node // context.local_size))
    number = text.partition(",")[0].strip()
    threads = int(number) if number.isdigit() else 0
    if threads < 1:
        found = f"OMP_NUM_THREADS is {text!r}; must be a whole number"
    elif threads > cores:
        found = f"OMP_NUM_THREADS is {threads}, but this process may run on {cores} cores"
    elif given and threads > given:
        found = f"OMP_NUM_THREADS is {threads}, but a task has {given} cores"
    elif threads * context.local_size > of_node:
        found = f"{context.local_size} processes with {threads} threads each share {of_node} cores of {context.node}"
    else:
        return ok("threads", f"{threads} on {cores} cores, {shared}")
    return problem("threads", found, f"export OMP_NUM_THREADS={fair}")


def binding_findings(context: CheckContext, cores: int) -> list[Finding]:
    """Whether srun bound a task to fewer cores than the job asked for, as it does since Slurm 22.05 unless told."""
    given = _cpus_per_task(context)
    if given is None or not context.in_step:
        return []
    if cores >= given:
        return [ok("binding", f"{cores} cores, {given} asked for")]
    found = f"SLURM_CPUS_PER_TASK is {given}, but srun bound this task to {cores}"
    fix = "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK   (in the batch script, before srun)"
    return [problem("binding", found, fix)]


def _cpus_per_task(context: CheckContext) -> int | None:
    text = context.environ.get("SLURM_CPUS_PER_TASK", "")
    return int(text) if text.isdigit() and int(text) else None
