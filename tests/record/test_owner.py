"""One owner per run folder."""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from hpc_oialr.errors import OIALRError
from hpc_oialr.record import owner as module
from hpc_oialr.record.owner import Claim, FolderInUseError, Owner, Ownership, started
from hpc_oialr.record.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def held_by(folder: RunFolder, silent_s: float = 0.0, **fields: object) -> Owner:
    """As another process would have left it."""
    owner = Owner(command="oialr train", **fields)  # type: ignore[arg-type]
    folder.path.mkdir(exist_ok=True)
    folder.owner.write_text(json.dumps({"version": 1, **vars(owner)}))
    os.utime(folder.owner, (time.time() - silent_s,) * 2)
    return owner


def take(folder: RunFolder, job_over: bool | None = None) -> None:
    with closing(Claim("oialr resume", lambda job: job_over).take(folder)) as held:
        assert json.loads(folder.owner.read_text())["token"] == held.owner.token
        assert held.look() == ""
    assert list(folder.path.iterdir()) == []


ELSEWHERE = {"host": "far", "pid": 4711, "space": "another kernel"}


def test_a_second_one_is_told_who_and_what_to_do(folder):
    with closing(Claim("oialr train").take(folder)) as held:
        with pytest.raises(FolderInUseError) as caught:
            take(folder)
        assert f"{folder.path} is in use by process {os.getpid()} on {held.owner.host} (oialr train, since " in str(
            caught.value
        )
        assert str(caught.value).endswith(f"if it is gone for sure: rm {folder.owner}")
        assert list(folder.path.iterdir()) == [folder.owner]
    take(folder)


def test_the_dead_of_this_host_are_known_at_once(folder, caplog):
    held_by(folder, started="1")
    take(folder)
    assert "taken over from process" in caplog.text
    held_by(folder, pid=2**22 + 1)
    take(folder)
    assert started(os.getpid()) != ""
    assert started(2**22 + 1) == ""


@pytest.mark.parametrize(
    ("fields", "silent_s", "job_over", "dead"),
    [
        (ELSEWHERE, 10, None, False),
        (ELSEWHERE, 301, None, True),
        (ELSEWHERE | {"job": "12"}, 301, None, True),
        (ELSEWHERE | {"job": "12"}, 9999, False, False),
        (ELSEWHERE | {"job": "12"}, 55, True, True),
        # Submitted, not begun.
        ({"pid": 0, "started": "", "job": "12"}, 9999, False, False),
        ({"pid": 0, "started": "", "job": "12"}, 55, True, True),
    ],
)
def test_others_by_their_silence_and_by_what_slurm_says(folder, fields, silent_s, job_over, dead):
    held_by(folder, silent_s, **fields)
    if dead:
        take(folder, job_over)
    else:
        with pytest.raises(FolderInUseError, match=rf"last sign of life {silent_s} s ago"):
            take(folder, job_over)


def test_a_job_that_is_over_but_gives_signs_of_life_is_anothers_of_the_same_number(folder, monkeypatch):
    monkeypatch.setattr(module, "_HANDOVER_S", 0.0)
    held_by(folder, **ELSEWHERE, job="12")
    with pytest.raises(FolderInUseError):
        take(folder, job_over=True)


def test_a_job_takes_what_was_left_to_it(folder, monkeypatch):
    """By the command that submitted it, or by itself before it was requeued."""
    claim = Claim("oialr submit")
    with closing(claim.take(folder)) as held:
        held.hand_over("12")
    assert folder.owner.exists()
    with pytest.raises(FolderInUseError, match=r"is in use by a job submitted on .*, job 12 \(oialr submit"):
        take(folder, job_over=False)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    take(folder, job_over=False)
    held_by(folder, **ELSEWHERE, job="12")
    with pytest.raises(FolderInUseError):
        take(folder, job_over=False)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    take(folder, job_over=False)


def test_a_job_waits_for_the_command_that_submits_it(folder):
    submitting = Claim("oialr submit").take(folder)
    ending = threading.Timer(0.2, submitting.close)
    ending.start()
    take(folder)
    ending.join()


@pytest.mark.parametrize(
    "content",
    [b"\0" * 300, b"[" * 100_000, b'{"version": 1, "command": "c", "pid": 5, "space": "another host\'s"}'],
)
def test_a_damaged_file_is_a_holder_that_nobody_knows(folder, content):
    folder.path.mkdir()
    folder.owner.write_bytes(content)
    with pytest.raises(FolderInUseError, match=r"in use by process -1 on unknown"):
        take(folder)
    os.utime(folder.owner, (time.time() - 400,) * 2)
    take(folder)


@pytest.mark.parametrize(
    "make",
    [lambda path: path.symlink_to("gone"), os.mkfifo, Path.mkdir],
    ids=["dangling link", "pipe", "folder"],
)
def test_what_is_no_file_is_an_error_and_no_endless_wait(folder, make):
    folder.path.mkdir()
    make(folder.owner)
    with pytest.raises(OIALRError, match=r"owner\.json cannot be written \(it is there as a link, a folder or a pipe"):
        take(folder)


@pytest.mark.parametrize("links", [True, False])
def test_of_many_at_once_one_gets_it(folder, links, monkeypatch):
    """With a dead owner in the way, and on a file system without links."""
    if not links:

        def refuse(self: Path, target: Path) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(Path, "hardlink_to", refuse)
    for _ in range(10):
        held_by(folder, started="1")
        got: list[Ownership] = []
        refused: list[OIALRError] = []
        together = threading.Barrier(6)

        def claim(got=got, refused=refused, together=together) -> None:
            together.wait()
            try:
                got.append(Claim().take(folder))
            except FolderInUseError as error:
                refused.append(error)

        threads = [threading.Thread(target=claim) for _ in range(6)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert (len(got), len(refused)) == (1, 5)
        assert got[0].look() == ""
        got[0].close()
        assert list(folder.path.iterdir()) == []


def test_an_owner_notices_what_becomes_of_its_folder(folder, monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 0.01)
    with closing(Claim().take(folder)) as held:
        os.utime(folder.owner, (0, 0))
        folder.owner.unlink()
        end = time.monotonic() + 10
        while not (folder.owner.exists() and folder.owner.stat().st_mtime > 0) and time.monotonic() < end:
            time.sleep(0.01)
        assert held.look() == ""
        other = held_by(folder, token="another")
        assert held.look() == f"{folder.path} was taken by {other}"
    assert json.loads(folder.owner.read_text())["token"] == "another"
    folder.owner.unlink()
    with closing(Claim().take(folder)) as held:
        folder.path.rename(folder.path.with_name("moved"))
        assert held.look() == f"{folder.path} was removed while its run was going on"
