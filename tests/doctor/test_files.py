"""Disks that are full, read-only or without locks: real ones where root may mount them."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpc_oialr.commands import Answer
from hpc_oialr.doctor import CheckContext, Finding, host, probe

DONE = Answer(code=0)


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a file system in memory."""
    points: list[Path] = []

    def mount(options: str) -> Path:
        point = tmp_path / f"disk{len(points)}"
        point.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "oialr-test", str(point)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"a small disk cannot be mounted here: {error}")
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        points.append(point)
        return point

    yield mount
    for point in points:
        subprocess.run(["umount", "-l", str(point)], check=True)


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what the probe reports, and how it ended."""

    def put(report: dict[str, Any], answer: Answer = DONE) -> None:
        monkeypatch.setattr(CheckContext, "probe", lambda *_: (report, answer))

    return put


def report_of(capsys: pytest.CaptureFixture[str], folder: Path) -> dict[str, Any]:
    """What the probe reports of a folder, run in this process."""
    probe.folder(str(folder))
    return {key: value for line in capsys.readouterr().out.splitlines() for key, value in json.loads(line).items()}


def test_a_good_folder_that_is_not_there_yet(context, tmp_path):
    findings = host.check_folder(context(folder=tmp_path / "a" / "b", need_gib=1e-6))
    assert [(finding.name, finding.state) for finding in findings] == [
        ("run folder", "ok"),
        ("free space", "ok"),
    ]
    assert findings[0].found == f"{tmp_path}: files are written, renamed at once and read back"
    assert list(tmp_path.glob(".oialr*")) == []


def test_a_full_disk(context, mounted):
    disk = mounted("size=1m")
    (disk / "big").write_bytes(bytes(2**20 - 8192))
    found = by_name(host.check_folder(context(folder=disk, need_gib=5.0)))
    assert found["run folder"].state == found["free space"].state == "problem"
    assert found["run folder"].found == f"{disk}: cannot write: No space left on device"
    assert found["run folder"].fix.startswith(f"df -h {disk}; quota -s")
    assert found["free space"].found.startswith(f"0.0 GiB on {disk} (tmpfs), 5 needed")
    assert "--need-gib GIB" in found["free space"].fix


def test_a_disk_without_inodes(context, mounted):
    disk = mounted("size=8m,nr_inodes=40")
    inodes = by_name(host.check_folder(context(folder=disk, need_gib=1e-6)))["inodes"]
    assert inodes.state == "problem"
    assert f"more files fit on {disk} (tmpfs)" in inodes.found


def test_little_space_as_the_system_tells_it(context, monkeypatch, reported, tmp_path, capsys):
    space = SimpleNamespace(f_bavail=1, f_frsize=2**30, f_files=0, f_favail=0)
    monkeypatch.setattr(os, "statvfs", lambda path: space)
    reported(report_of(capsys, tmp_path))
    found = by_name(host.check_folder(context(folder=tmp_path, need_gib=5.0)))
    assert found["free space"].state == "problem"
    assert found["free space"].found.startswith("1.0 GiB on ")
    assert "inodes" not in found, "some file systems do not count them"


def test_a_read_only_disk(context, mounted):
    disk = mounted("size=1m,ro")
    found = by_name(host.check_folder(context(folder=disk, need_gib=1e-6)))["run folder"]
    assert found.state == "problem"
    assert found.found == f"{disk}: cannot make a folder: Read-only file system"
    assert found.fix.startswith("--folder DIR, and --out DIR")


def test_a_folder_closed_to_its_owner(context, reported, tmp_path):
    report = {"there": str(tmp_path), "step": "write", "errno": errno.EACCES, "error": "Permission denied"}
    reported(report | {"owner": os.geteuid()})
    (found,) = host.check_folder(context())
    assert (found.state, found.fix) == ("problem", f"chmod u+rwx {tmp_path}")
    reported(report | {"owner": os.geteuid() + 1})
    (found,) = host.check_folder(context())
    assert found.fix.startswith("--folder DIR")


def test_a_file_in_the_folders_place(context, tmp_path):
    (tmp_path / "runs").write_text("")
    (found,) = host.check_folder(context(folder=tmp_path / "runs"))
    assert found.state == "problem"
    assert "is no folder" in found.found


def test_a_rename_that_leaves_the_old_file(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Path, "replace", lambda self, target: None)
    report = report_of(capsys, tmp_path)
    assert (report["step"], "works" in report) == ("rename", False)
    assert list(tmp_path.iterdir()) == []


def test_a_file_server_that_does_not_answer(context, reported):
    reported({}, Answer(trouble="hung"))
    (found,) = host.check_folder(context())
    assert found.state == "problem"
    assert found.found.endswith("gives no answer: no answer in time")
    assert "tell the administrators of " in found.fix


def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("")
    folder.chmod(0o700)
    return folder


def test_hdf5(context, tmp_path):
    (found,) = host.check_hdf5(context(folder=tmp_path))
    assert (found.name, found.state) == ("HDF5", "ok")
    assert found.found.endswith(" writes, with locks")
    assert list(tmp_path.glob(".oialr*")) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(context, monkeypatch, reported, tmp_path, number):
    def no_locks(file: Any, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / "x").touch()
    report = {"lock": probe.lock(tmp_path / "x"), "hdf5": "2.0.0", "failed": ""}
    reported(report)
    (found,) = host.check_hdf5(context(folder=tmp_path))
    assert (found.state, found.fix) == ("problem", "export HDF5_USE_FILE_LOCKING=FALSE")
    assert f"has no file locks ({os.strerror(number)})" in found.found
    heeded = context({"HDF5_USE_FILE_LOCKING": "FALSE"}, folder=tmp_path)
    (found,) = host.check_hdf5(heeded)
    assert (found.state, found.found) == ("ok", "2.0.0 writes, without locks")


def test_a_lock_that_hangs(context, reported):
    reported({}, Answer(trouble="hung"))
    (found,) = host.check_hdf5(context())
    assert (found.state, found.fix) == ("problem", "export HDF5_USE_FILE_LOCKING=FALSE")
    assert found.found.endswith("fails: no answer in time")


def test_hdf5_that_cannot_write(context, reported):
    report = {"lock": 0, "hdf5": "2.0.0", "failed": "unable to lock file, errno = 524"}
    reported(report)
    (found,) = host.check_hdf5(context())
    assert (found.state, found.fix) == ("problem", "export HDF5_USE_FILE_LOCKING=FALSE")
    reported(report | {"failed": "broken"})
    (found,) = host.check_hdf5(context())
    assert "pip install --force-reinstall" in found.fix
