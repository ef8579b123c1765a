"""Disks that fill up or go away: the run goes on, says so once, and its record is whole in the end."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.small_disk import fill, small_disk
from support.spectra_reports import content, report, step_row, steps_in, writer_of

from hpc_oialr.errors import DataError
from hpc_oialr.spectra import open, store
from hpc_oialr.spectra.store import merge
from hpc_oialr.spectra.writer import SpectraWriter


class Disk:
    """A disk that is full now and then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        for name in ("write_flush", "write_record"):
            monkeypatch.setattr(store, name, self._checked(getattr(store, name)))

    def _checked(self, write: Callable[..., None]) -> Callable[..., None]:
        def checked(*arguments: Any) -> None:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(*arguments)

        return checked


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "whole.h5"
    write(writer_of(path), range(1, 9)).close()
    return path


def write(writer: SpectraWriter, steps: range) -> SpectraWriter:
    for t in steps:
        writer.write(report(t))
        writer.add_steps(step_row(t))
        writer.flush()
    return writer


@pytest.mark.parametrize("before", [0, 3])
def test_a_full_disk(run: Path, disk: Disk, whole: Path, caplog: pytest.LogCaptureFixture, before: int) -> None:
    writer = write(writer_of(run / "spectra.h5"), range(1, before + 1))
    disk.full = True
    write(writer, range(before + 1, 7))
    assert not writer.flush()
    assert (writer.written, writer.dropped) == (before, 0)
    writer.finish()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        f"{run / 'spectra.h5'} cannot be written ([Errno 28] No space left on device); training continues, and "
        "up to 1 MiB of the record are kept in memory."
    ]
    disk.full = False
    assert writer.flush()
    assert writer.written == 6
    write(writer, range(7, 9)).finish()
    writer.close()
    assert [path.name for path in run.iterdir()] == ["spectra.h5"]
    assert content(run) == content(whole)


def test_a_run_that_died_while_the_disk_was_full(
    run: Path, disk: Disk, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It resumes from a checkpoint, which it wrote before, and has the same updates again."""
    writer = write(writer_of(run / "spectra.h5"), range(1, 4))
    disk.full = True
    write(writer, range(4, 8)).close()
    assert "4 updates could not be written and are lost" in caplog.text
    again = writer_of(run / "spectra.h5")
    again.truncate_after(3)
    write(again, range(4, 6))
    disk.full = False
    write(again, range(6, 9)).close()
    assert content(run) == content(whole)


def test_a_checkpoint_that_is_ahead_of_the_spectra(
    run: Path, disk: Disk, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that was written although rows wait in memory: the steps that a crash would lose are named."""
    writer = write(writer_of(run / "spectra.h5"), range(1, 4))
    disk.full = True
    write(writer, range(4, 7))
    caplog.clear()
    assert not writer.flush(checkpoint=6)
    assert caplog.messages == [
        f"{run / 'spectra.h5'}: spectra of steps 4 to 6 are only in memory, and the checkpoint of step 6 is written: if "
        "the run dies now, they are lost. Make room on the disk; the next checkpoint writes them. If the run dies "
        "first, delete checkpoints/step_* from step 4 on, then resume: it starts from the one before, or anew."
    ]
    caplog.clear()
    disk.full = False
    assert writer.flush(checkpoint=6)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    write(writer, range(7, 9)).close()
    assert content(run) == content(whole)


def test_a_join_without_room(run: Path, disk: Disk, whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = write(writer_of(run / "spectra.h5"), range(1, 9))
    disk.full = True
    writer.finish()
    assert "stays in several files ([Errno 28] No space left on device); readers see" in caplog.text
    assert f"oialr spectra merge {run}" in caplog.text
    assert content(run) == content(whole)


def test_what_neither_disk_nor_memory_can_take(run: Path, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    disk.full = True
    writer = write(writer_of(run / "spectra.h5", memory_bytes=2500), range(1, 9))
    writer.close()
    assert "8 updates could not be written and are lost" in caplog.text
    assert 1 <= writer.dropped < 8, "the first ones were kept, in case there is room again"
    with pytest.raises(DataError, match=r"spectra.h5 does not exist; must be the spectra.h5 of a run"):
        open(run)


def test_a_folder_that_is_gone_for_a_while(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    missing = tmp_path / "missing"
    writer = write(writer_of(missing / "spectra.h5"), range(1, 3))
    assert "No such file or directory" in caplog.text
    missing.mkdir()
    writer.close()
    assert steps_in(missing) == [1, 2]


def test_a_real_disk_that_fills_up(tmp_path: Path, whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path / "small", kib=96) as run:
        writer = write(writer_of(run / "spectra.h5"), range(1, 3))
        other = fill(run, left=20_000)
        write(writer, range(3, 9))
        assert 2 <= writer.written < 8
        assert caplog.text.count("[Errno 28] No space left on device") == 1
        assert steps_in(run) == list(range(1, writer.written + 1))
        with pytest.raises(OSError, match="No space left on device"):
            merge(run)
        other.unlink()
        writer.close()
        assert content(run) == content(whole)
        merge(run)
        assert content(run) == content(whole)
        assert [path.name for path in run.iterdir()] == ["spectra.h5"]
