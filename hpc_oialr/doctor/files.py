"""The run folder and its file locks."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from shlex import quote

from hpc_oialr.doctor.context import CheckContext, Finding, ok, problem

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EIO, 524)
_FEW_INODES = 10_000
_WITHOUT_LOCKS = "export HDF5_USE_FILE_LOCKING=FALSE"
_ELSEWHERE = "--folder DIR, and --out DIR for the run: a folder of your own on another file system"


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
