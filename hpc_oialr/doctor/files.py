"""The run's folder, its locks, and the folder of temporary files."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from shlex import quote
from typing import Any

from hpc_oialr.commands import Answer
from hpc_oialr.doctor.context import CheckContext
from hpc_oialr.doctor.finding import Finding, ok, problem
from hpc_oialr.doctor.programs import probe

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EIO, 524)
_UNLOCKED = ("FALSE", "0")
_FEW_INODES = 10_000
_WITHOUT_LOCKS = "export HDF5_USE_FILE_LOCKING=FALSE"
_ELSEWHERE = "--folder DIR, and --out DIR for the run: a folder of your own on another file system"


def check_folder(context: CheckContext) -> list[Finding]:
    """Use the run's folder, in a process of its own: a file server may hang whoever asks it."""
    if not context.first_of_node:
        return []
    report, answer = probe(context, "try_folder", str(context.folder.absolute()))
    if answer.trouble == "hung" or not report:
        found = f"the file system of {context.folder} gives no answer: {answer.reason}"
        return [
            problem("run folder", found, f"{_ELSEWHERE}; tell the administrators of {mount(context.folder)}")
        ]
    return judge_folder(context, report)


def judge_folder(context: CheckContext, report: dict[str, Any]) -> list[Finding]:
    """What the trial in the folder says."""
    there = Path(report["there"])
    findings = [_usable(report), *_space(context, report)]
    if report.get("holds_run"):
        findings += _ownership(report, there)
    return findings


def _usable(report: dict[str, Any]) -> Finding:
    there, number = report["there"], report.get("errno")
    if report.get("works"):
        return ok("run folder", f"{there}: files are written, renamed at once and read back")
    found = f"{there}: cannot {report.get('step', 'be used')}: {report.get('error', 'no answer in time')}"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return problem(
            "run folder", found, f"df -h {quote(there)}; quota -s   (then delete what is not needed)"
        )
    if number == errno.EACCES and report.get("owner") == os.geteuid():
        return problem("run folder", found, f"chmod u+rwx {quote(there)}")
    return problem("run folder", found, _ELSEWHERE)


def _space(context: CheckContext, report: dict[str, Any]) -> list[Finding]:
    """Space and numbers of files that are left; some file systems do not count files."""
    if "free_bytes" not in report:
        return []
    where, free = mount(Path(report["there"])), report["free_bytes"] / 2**30
    fix = f"delete old runs, or {_ELSEWHERE}"
    findings = [ok("free space", f"{free:,.1f} GiB on {where}, {context.need_gib:g} needed")]
    if free < context.need_gib:
        findings[0] = problem("free space", findings[0].found, f"{fix}; or state the need: --need-gib GIB")
    if report["inodes"] > 0 and report["free_inodes"] < _FEW_INODES:
        findings.append(problem("inodes", f"{report['free_inodes']} more files fit on {where}", fix))
    return findings


def _ownership(report: dict[str, Any], there: Path) -> list[Finding]:
    """Checkpoints and pickles of somebody else are not read."""
    if report["owner"] != os.geteuid():
        found = f"the run in {there} belongs to user {report['owner']}, this is user {os.geteuid()}"
        return [problem("owner", found, "--out DIR: a folder of your own")]
    if report["mode"] & 0o022:
        return [problem("owner", f"others may write into {there}", f"chmod go-w {quote(str(there))}")]
    return [ok("owner", f"this user, mode {report['mode']:04o}")]


def check_hdf5(context: CheckContext) -> list[Finding]:
    """Locks in the run's folder: HDF5 takes one for each file, and some parallel file systems have none."""
    if not context.first_of_node:
        return []
    report, answer = probe(context, "try_hdf5", str(context.folder.absolute()))
    return judge_hdf5(context, report, answer)


def judge_hdf5(context: CheckContext, report: dict[str, Any], answer: Answer) -> list[Finding]:
    """What the trial with locks and HDF5 says."""
    if "unusable" in report:
        return []  # the folder's own line tells why
    if "lock" not in report:
        found = f"a file lock in {context.folder} fails: {answer.reason}"
        return [problem("HDF5", found, _WITHOUT_LOCKS)]
    return [_locking(context, report, answer), *map(_held, report["locked"].items())]


def _locking(context: CheckContext, report: dict[str, Any], answer: Answer) -> Finding:
    unlocked = context.environ.get("HDF5_USE_FILE_LOCKING", "").upper() in _UNLOCKED
    failed = report.get("failed", answer.reason)
    if report["lock"] in _NO_LOCKS and not unlocked:
        found = f"{mount(context.folder)} has no file locks ({os.strerror(report['lock'])})"
        return problem("HDF5", found, _WITHOUT_LOCKS)
    if failed:
        fix = _WITHOUT_LOCKS if "lock" in failed else 'pip install --force-reinstall "h5py>=3.10"'
        return problem("HDF5", f"a file cannot be written: {failed}", fix)
    return ok("HDF5", f"{report['hdf5']} writes, " + ("without locks" if unlocked else "with locks"))


def _held(locked: tuple[str, int | None]) -> Finding:
    path, pid = locked
    who = "another process" if pid is None else f"process {pid}"
    fix = f"kill {pid}" if pid is not None else f"lsof {quote(path)}   (on each node; then end that process)"
    return problem(
        "HDF5 lock", f"{who} has locked {path}: does a run go on there?", f"{fix}, or {_WITHOUT_LOCKS}"
    )


def check_tmpdir(context: CheckContext) -> list[Finding]:
    """Temporary files: torch, MPI and compilers put sockets and caches there."""
    given = context.environ.get("TMPDIR")
    if given is None or not context.first_of_node:
        return []
    try:
        with tempfile.NamedTemporaryFile(dir=given) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        fix = f"mkdir -p {quote(given)}, or: unset TMPDIR"
        return [problem("TMPDIR", f"{given}: {error.strerror}", fix)]
    return [ok("TMPDIR", f"{given} can be written")]


def mount(folder: Path) -> str:
    """Where the file system of a folder is mounted, and its type; asked of the kernel, not of the file system."""
    path = folder.absolute()
    try:
        rows = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return str(path)
    points = {point.encode().decode("unicode_escape"): kind for point, kind in rows}
    inside = [point for point in points if path.is_relative_to(point)]
    return f"{(best := max(inside, key=len))} ({points[best]})" if inside else str(path)
