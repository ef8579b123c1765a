"""What this host gives a run: its folder and file locks, threads and cores, limits."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from shlex import quote

from hpc_oialr.distributed.environment import in_step, usable_cores
from hpc_oialr.doctor.context import CheckContext, Finding, note, ok, problem

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EIO, 524)
_FEW_INODES = 10_000
_WITHOUT_LOCKS = "export HDF5_USE_FILE_LOCKING=FALSE"
_ELSEWHERE = "--folder DIR, and --out DIR for the run: a folder of your own on another file system"
_INFINIBAND, _SHARED = Path("/sys/class/infiniband"), Path("/dev/shm")
_FILES, _FILES_A_PROCESS = 256, 4
# With less, InfiniBand cannot register its buffers, and NCCL fails (containers have 64 MiB by default).
_LOCKED_GIB, _SHARED_GIB = 1.0, 0.25
_GIB = 2**30


def check_folder(context: CheckContext) -> list[Finding]:
    """Use the run folder, in a process of its own: a file server may hang its clients."""
    report, answer = context.probe("folder", str(context.folder.absolute()))
    if answer.trouble == "hung" or not report:
        found = f"the file system of {context.folder} gives no answer: {answer.reason}"
        fix = f"{_ELSEWHERE}; tell the administrators of {mount(context.folder)}"
        return [problem("run folder", found, fix)]
    there = Path(report["there"])
    if report.get("works"):
        findings = [ok("run folder", f"{there}: files are written, renamed at once and read back")]
    else:
        step, error = report.get("step", "be used"), report.get("error", "no answer in time")
        number, fix = report.get("errno"), _ELSEWHERE
        if number in (errno.ENOSPC, errno.EDQUOT):
            fix = f"df -h {quote(str(there))}; quota -s   (then delete what is not needed)"
        elif number == errno.EACCES and report.get("owner") == os.geteuid():
            fix = f"chmod u+rwx {quote(str(there))}"
        findings = [problem("run folder", f"{there}: cannot {step}: {error}", fix)]
    if "free_bytes" in report:
        where, free = mount(there), report["free_bytes"] / 2**30
        fix = f"delete old runs, or {_ELSEWHERE}"
        found = f"{free:,.1f} GiB on {where}, {context.need_gib:g} needed"
        if free < context.need_gib:
            findings.append(problem("free space", found, f"{fix}; or state the need: --need-gib GIB"))
        else:
            findings.append(ok("free space", found))
        # Some file systems do not count files.
        if report["inodes"] > 0 and report["free_inodes"] < _FEW_INODES:
            findings.append(problem("inodes", f"{report['free_inodes']} more files fit on {where}", fix))
    return findings


def check_hdf5(context: CheckContext) -> list[Finding]:
    """File locks in the run folder: HDF5 locks each file, and some parallel file systems have no locks."""
    report, answer = context.probe("hdf5", str(context.folder.absolute()))
    if "unusable" in report:
        return []  # check_folder has the reason
    if "lock" not in report:
        return [problem("HDF5", f"a file lock in {context.folder} fails: {answer.reason}", _WITHOUT_LOCKS)]
    unlocked = context.environ.get("HDF5_USE_FILE_LOCKING", "").upper() in ("FALSE", "0")
    failed = report.get("failed", answer.reason)
    if report["lock"] in _NO_LOCKS and not unlocked:
        found = f"{mount(context.folder)} has no file locks ({os.strerror(report['lock'])})"
        return [problem("HDF5", found, _WITHOUT_LOCKS)]
    if failed:
        fix = _WITHOUT_LOCKS if "lock" in failed else 'pip install --force-reinstall "h5py>=3.10"'
        return [problem("HDF5", f"a file cannot be written: {failed}", fix)]
    how = "without locks" if unlocked else "with locks"
    return [ok("HDF5", f"{report['hdf5']} writes, {how}")]


def mount(folder: Path) -> str:
    """Mount point and type of a folder's file system; the kernel is asked, not the file system, which may hang."""
    path = folder.absolute()
    try:
        rows = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return str(path)
    points = {point.encode().decode("unicode_escape"): kind for point, kind in rows}
    inside = [point for point in points if path.is_relative_to(point)]
    return f"{(best := max(inside, key=len))} ({points[best]})" if inside else str(path)


def check_limits(context: CheckContext) -> list[Finding]:
    """Open files, locked memory where there is InfiniBand, shared memory."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Rank 0 holds connections to all others.
    need = _FILES + _FILES_A_PROCESS * context.size
    if limit == resource.RLIM_INFINITY or limit >= need:
        findings = [ok("open files", "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}")]
    else:
        found = f"{limit:,}; {context.size:,} ranks need {need:,}"
        findings = [problem("open files", found, f"ulimit -n {need}")]
    if _INFINIBAND.exists() and any(_INFINIBAND.iterdir()):
        limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if limit == resource.RLIM_INFINITY or limit >= _LOCKED_GIB * _GIB:
            findings.append(ok("locked memory", "enough for InfiniBand"))
        else:
            found = f"{limit // 1024:,} KiB; InfiniBand needs it unlimited"
            fix = "ulimit -l unlimited   (where forbidden: the administrators, PropagateResourceLimitsExcept=MEMLOCK)"
            findings.append(problem("locked memory", found, fix))
    if context.in_scope("node") and _SHARED.exists():
        space = os.statvfs(_SHARED)
        size = space.f_blocks * space.f_frsize
        if size >= _SHARED_GIB * _GIB:
            findings.append(ok("/dev/shm", f"{size / _GIB:,.1f} GiB"))
        else:
            state = problem if context.local_size > 1 or context.gpus_asked else note
            found = f"{size / 2**20:,.0f} MiB: too little for NCCL and the workers of data loaders"
            findings.append(state("/dev/shm", found, "docker run --shm-size=8g, or NCCL_SHM_DISABLE=1"))
    return findings


def check_threads(context: CheckContext) -> list[Finding]:
    """OMP_NUM_THREADS against the cores of this process and of its node; cores that srun bound it to."""
    cores, of_node = usable_cores(), os.cpu_count() or 1
    asked, text = context.environ.get("SLURM_CPUS_PER_TASK", ""), context.environ.get("OMP_NUM_THREADS")
    given = int(asked) if asked.isdigit() else 0
    # Processes that are not bound see the same cores, and share them.
    fair = min(given, cores) if given else max(1, min(cores, of_node // context.local_size))
    number = (text or "").partition(",")[0].strip()
    threads = int(number) if number.isdigit() else 0
    found = ""
    if text is not None and threads < 1:
        found = f"OMP_NUM_THREADS is {text!r}; must be a whole number"
    elif threads > cores:
        found = f"OMP_NUM_THREADS is {threads}, but this process may run on {cores} cores"
    elif given and threads > given:
        found = f"OMP_NUM_THREADS is {threads}, but a task has {given} cores"
    elif threads * context.local_size > of_node:
        found = f"{context.local_size} ranks with {threads} threads each share {of_node} cores of {context.node}"
    if found:
        findings = [problem("threads", found, f"export OMP_NUM_THREADS={fair}")]
    else:
        fits = f"as many as cores: {cores}" if text is None else f"{threads} on {cores} cores"
        findings = [ok("threads", f"{fits}, {context.local_size} on the node share {of_node}")]
    # Since Slurm 22.05 srun binds a task to one core unless told how many the job asked for.
    if given and in_step(context.environ):
        if cores >= given:
            findings.append(ok("binding", f"{cores} cores, {given} asked for"))
        else:
            found = f"SLURM_CPUS_PER_TASK is {given}, but srun bound this task to {cores}"
            fix = "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK   (in the batch script, before srun)"
            findings.append(problem("binding", found, fix))
    return findings
