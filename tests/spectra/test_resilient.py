"""Disks that fill up or go away: the run goes on, says so once, and its record is whole in the end."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.small_disk import fill, small_disk
from support.spectra_reports import content, report, step_row, steps_in, writer_of

from hpc_oialr.errors import DataError
from hpc_oialr.spectra import files, open, store
from hpc_oialr.spectra import join as joining
from hpc_oialr.spectra.files import side_files, side_path
from hpc_oialr.spectra.join import merge
from hpc_oialr.spectra.writer import SpectraWriter


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(folder))
    return folder


class Disks:
    """Folders that are full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full: list[Path] = []
        for module, name in ((store, "write_flush"), (store, "write_record"), (joining, "write_record")):
            monkeypatch.setattr(module, name, self._checked(getattr(module, name)))

    def _checked(self, write: Callable[..., None]) -> Callable[..., None]:
        def checked(path: Path, *arguments: Any) -> None:
            if any(path.is_relative_to(folder) for folder in self.full):
                raise OSError(errno.ENOSPC, "No space left on device")
            write(path, *arguments)

        return checked


@pytest.fixture
def disks(monkeypatch: pytest.MonkeyPatch) -> Disks:
    return Disks(monkeypatch)


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


def make(run: Path, **options: Any) -> SpectraWriter:
    return writer_of(run / "spectra.h5", side=side_path(run / "spectra.h5"), **options)


def test_a_full_disk(
    run: Path, temporary_folder: Path, disks: Disks, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = write(make(run), range(1, 4))
    disks.full.append(run)
    write(writer, range(4, 9))
    assert writer.written == 8
    assert content(run) == content(whole), "a reader sees both files as one"
    writer.finish()
    writer.close()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    side = side_path(run / "spectra.h5")
    assert side.is_relative_to(temporary_folder)
    assert side.parent.stat().st_mode & 0o777 == 0o700
    assert warnings[0] == (
        f"{run / 'spectra.h5'} cannot be written ([Errno 28] No space left on device); the training goes on, and "
        f"the record continues in {side}. Once there is room: oialr spectra merge {run}"
    )
    assert [f"{side} holds a part of it" in text for text in warnings[1:]] == [True], "at the end once more"
    disks.full.clear()
    assert merge(run) == run / "spectra.h5"
    assert not list(side.parent.iterdir())
    assert [path.name for path in run.iterdir()] == ["spectra.h5"]
    assert content(run) == content(whole)


def test_room_again_at_the_end(run: Path, disks: Disks, whole: Path) -> None:
    writer = write(make(run), range(1, 4))
    disks.full.append(run)
    write(writer, range(4, 9))
    disks.full.clear()
    writer.finish()
    assert not side_files(side_path(run / "spectra.h5"))
    assert content(run) == content(whole)


def test_a_disk_that_was_full_from_the_start(tmp_path: Path, run: Path, disks: Disks, whole: Path) -> None:
    """Then no file in the run's folder names the side folder of the settings."""
    disks.full.append(run)
    side = side_path(run / "spectra.h5", tmp_path / "scratch")
    writer = write(writer_of(run / "spectra.h5", side=side), range(1, 9))
    disks.full.clear()
    writer.finish()
    assert not side_files(side)
    assert content(run) == content(whole)


def test_a_resumed_run_takes_its_side_file_home(run: Path, disks: Disks, whole: Path) -> None:
    writer = write(make(run), range(1, 4))
    disks.full.append(run)
    write(writer, range(4, 8)).close()
    disks.full.clear()
    again = make(run)
    again.truncate_after(5)
    assert steps_in(run) == [1, 2, 3, 4, 5]
    assert not side_files(side_path(run / "spectra.h5"))
    write(again, range(6, 9)).close()
    assert content(run) == content(whole)


def test_a_resumed_run_whose_disk_is_still_full(run: Path, disks: Disks, whole: Path) -> None:
    writer = write(make(run), range(1, 4))
    disks.full.append(run)
    write(writer, range(4, 8)).close()
    again = make(run)
    again.truncate_after(5)
    write(again, range(6, 9)).close()
    assert content(run) == content(whole)


def test_both_disks_full(
    run: Path, temporary_folder: Path, disks: Disks, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = write(make(run), range(1, 4))
    disks.full += [run, temporary_folder]
    write(writer, range(4, 7))
    assert writer.written == 3
    assert caplog.text.count("Nor can ") == 1
    assert "up to 1 MiB of the record stay in memory until a checkpoint finds room" in caplog.text
    disks.full.clear()
    assert writer.flush()
    assert writer.written == 6
    write(writer, range(7, 9)).close()
    assert content(run) == content(whole)


def test_what_no_disk_and_no_memory_can_take(
    run: Path, temporary_folder: Path, disks: Disks, caplog: pytest.LogCaptureFixture
) -> None:
    disks.full += [run, temporary_folder]
    writer = write(make(run, memory_bytes=2500), range(1, 9))
    writer.close()
    assert "8 events could be written nowhere and are lost" in caplog.text
    assert 1 <= writer.store.dropped < 8, "the first ones were kept, in case there is room again"
    with pytest.raises(DataError, match=r"spectra.h5 does not exist; must be the spectra.h5 of a run"):
        open(run)


def test_a_folder_that_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    missing = tmp_path / "missing"
    write(make(missing), range(1, 3)).close()
    assert "No such file or directory" in caplog.text
    assert steps_in(missing / "spectra.h5") == [1, 2]


def test_a_side_folder_of_somebody_else(
    run: Path, disks: Disks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    side = side_path(run / "spectra.h5")
    side.parent.mkdir()
    monkeypatch.setattr(files.os, "getuid", lambda: os.geteuid() + 1)
    monkeypatch.setattr(store, "make_side_folder", lambda _: files.make_side_folder(side))
    disks.full.append(run)
    with caplog.at_level(logging.INFO):
        write(make(run), range(1, 2))
    assert f"{side.parent} belongs to another user; it must be this user's own" in caplog.text
    assert not side.exists()


def test_the_side_folder_of_the_settings(tmp_path: Path, run: Path) -> None:
    """A reader finds it by the settings that the record holds."""
    side = side_path(run / "spectra.h5", tmp_path / "scratch")
    main, elsewhere = writer_of(run / "spectra.h5"), writer_of(side)
    for writer in (main, elsewhere):
        writer.store.main.attributes = {"config": {"record": {"side_folder": str(tmp_path / "scratch")}}}
    write(main, range(1, 3))
    side.parent.mkdir(parents=True)
    write(elsewhere, range(3, 5))
    assert steps_in(run) == [1, 2, 3, 4]


def test_a_side_file_of_another_run_is_left_alone(tmp_path: Path, run: Path, disks: Disks) -> None:
    twin = tmp_path / "elsewhere" / "run"
    twin.mkdir(parents=True)
    write(make(run), range(1, 3))
    disks.full.append(twin)
    write(make(twin), range(1, 6))
    assert steps_in(run) == [1, 2]
    assert steps_in(twin / "spectra.h5") == [1, 2, 3, 4, 5]


def test_a_real_disk_that_fills_up(tmp_path: Path, whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path / "small", kib=96) as run:
        writer = write(make(run), range(1, 3))
        other = fill(run, left=20_000)
        write(writer, range(3, 9)).close()
        assert writer.written == 8
        assert caplog.text.count("[Errno 28] No space left on device") == 1
        assert side_files(side_path(run / "spectra.h5"))
        assert content(run) == content(whole)
        with pytest.raises(OSError, match="No space left on device"):
            merge(run)
        assert content(run) == content(whole)
        other.unlink()
        merge(run)
        assert content(run) == content(whole)
        assert [path.name for path in run.iterdir()] == ["spectra.h5"]
