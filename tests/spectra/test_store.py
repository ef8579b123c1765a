"""The chain of files: whole at every moment, cut and joined without loss."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.spectra_reports import ATTRIBUTES, NAMES, SEGMENTS, content, report, step_row, steps_in

from hpc_oialr.errors import DataError
from hpc_oialr.spectra import files as record_files
from hpc_oialr.spectra import open, store
from hpc_oialr.spectra.schema import Rows, rows_of_update, steps_of, together
from hpc_oialr.spectra.store import Chain, merge

LAST = 12
PLACES = {name: place for place, name in enumerate(NAMES)}
# Three kinds: flushes alone, with joined ones before them, and of so few bytes that each joined file is full.
KINDS = {
    "flushes": {"join_flushes": 99},
    "joined": {"join_flushes": 5},
    "segments": {"join_flushes": 2, "join_bytes": 1},
}


def rows(t: int) -> Rows:
    event = rows_of_update(report(t, names=NAMES[:2]), PLACES)
    return together([event, steps_of([step_row(t)])])


def written(path: Path, steps: range, **join: int) -> Chain:
    chain = Chain(path, ATTRIBUTES, **join)
    for t in steps:
        chain.append(rows(t))
    return chain


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed") / "spectra.h5"
    written(path, range(1, LAST + 1), join_flushes=99)
    return merge(path)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("flushes", [f"spectra.h5.{number:03d}.npz" for number in range(LAST)]),
        ("joined", ["spectra.h5", "spectra.h5.001.npz", "spectra.h5.002.npz"]),
        ("segments", ["spectra.h5", *(f"spectra.h5.{number:03d}" for number in range(1, LAST))]),
    ],
)
def test_flushes_are_joined(tmp_path: Path, undisturbed: Path, kind: str, expected: list[str]) -> None:
    path = tmp_path / "spectra.h5"
    written(path, range(1, LAST + 1), **KINDS[kind])
    assert files(tmp_path) == expected
    assert content(path) == content(undisturbed)
    assert steps_in(tmp_path / expected[-1])[-1] == LAST, "a file can be read alone"
    assert merge(tmp_path) == path
    assert files(tmp_path) == ["spectra.h5"]
    assert content(path) == content(undisturbed)


@pytest.mark.parametrize("t", [1, 7, LAST - 1, LAST, LAST + 9])
@pytest.mark.parametrize("kind", KINDS)
def test_cutting(tmp_path: Path, undisturbed: Path, kind: str, t: int) -> None:
    path = tmp_path / "spectra.h5"
    chain = written(path, range(1, LAST + 1), **KINDS[kind])
    chain.cut_after(t)
    with open(path) as run:
        assert [layer.t.tolist() for layer in run.values()] == [list(range(1, min(t, LAST) + 1))] * len(run)
        assert run.steps["step"].tolist() == list(range(1, min(t, LAST) + 1))
    for step in range(t + 1, LAST + 1):
        chain.append(rows(step))
    assert content(path) == content(undisturbed)


def test_cutting_everything(tmp_path: Path) -> None:
    written(tmp_path / "spectra.h5", range(1, 4), **SEGMENTS).cut_after(0)
    assert files(tmp_path) == []


def test_a_joined_record_is_gone_on_with(tmp_path: Path, undisturbed: Path) -> None:
    path = tmp_path / "spectra.h5"
    chain = written(path, range(1, 8))
    merge(path)
    chain.cut_after(5)
    assert steps_in(path) == list(range(1, 6))
    for t in range(6, LAST + 1):
        chain.append(rows(t))
    assert "spectra.h5.001.npz" in files(tmp_path)
    assert content(path) == content(undisturbed)


def test_flushes_that_a_killed_join_has_left(tmp_path: Path, undisturbed: Path) -> None:
    """They have the numbers of a joined file that is full: the next join must not take its place."""
    path = tmp_path / "spectra.h5"
    chain = written(path, range(1, 4), join_flushes=99)
    left = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    merge(path)
    for name, data in left.items():
        (tmp_path / name).write_bytes(data)
    assert steps_in(path) == [1, 2, 3], "each row once"
    chain = Chain(path, ATTRIBUTES, join_flushes=5, join_bytes=1000)
    for t in range(4, LAST + 1):
        chain.append(rows(t))
    assert not any(name.endswith(".npz") for name in files(tmp_path))
    assert content(path) == content(undisturbed)


class Camera:
    """Copies a folder before every operation of the file system: what a process that is gone then would leave."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, album: Path) -> None:
        self.folder, self.album, self.done = folder, album, 0
        self.pictures: list[tuple[Path, int]] = []
        for owner, name in (
            (Path, "open"),
            (Path, "replace"),
            (Path, "unlink"),
            (os, "fsync"),
            (record_files, "_Sink"),
        ):
            monkeypatch.setattr(owner, name, self._pictured(getattr(owner, name)))

    def _pictured(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def pictured(*arguments: Any, **options: Any) -> Any:
            copy = self.album / str(len(self.pictures))
            self.pictures.append((copy, self.done))
            subprocess.run(["cp", "-a", str(self.folder), str(copy)], check=True)
            return operation(*arguments, **options)

        return pictured


def life(path: Path) -> Iterator[int]:
    """A run that is resumed once from step 2, and joined at its end; each step that is done."""
    chain = Chain(path, ATTRIBUTES, join_flushes=3, join_bytes=10_000)
    for t in range(1, 5):
        chain.append(rows(t))
        yield t
    yield 2
    chain.cut_after(2)
    for t in range(3, 6):
        chain.append(rows(t))
        yield t
    merge(path)


def test_a_crash_between_any_two_operations_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, album, expected = tmp_path / "run", tmp_path / "album", tmp_path / "expected.h5"
    written(expected, range(1, 6))
    folder.mkdir()
    album.mkdir()
    with monkeypatch.context() as context:
        camera = Camera(context, folder, album)
        for t in life(folder / "spectra.h5"):
            camera.done = t
    assert len(camera.pictures) > 40, "the test met too few operations"
    for picture, done in camera.pictures:
        path = picture / "spectra.h5"
        found = steps_in(path) if list(picture.glob("spectra*")) else []
        assert found == list(range(1, len(found) + 1))
        assert len(found) >= done
        chain = Chain(path, ATTRIBUTES)
        chain.cut_after(2)
        for t in range(min(done, 2) + 1, 6):
            chain.append(rows(t))
        merge(path)
        assert content(path) == content(expected), picture
        assert files(picture) == ["spectra.h5"]


@pytest.mark.parametrize("name", ["spectra.h5", "spectra.h5.002", "spectra.h5.005.npz"])
def test_a_damaged_file_does_not_stop_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    path, file = tmp_path / "spectra.h5", tmp_path / name
    chain = written(path, range(1, 6), **SEGMENTS)
    chain.join_flushes, chain.join_bytes = 99, 2**20
    for t in range(6, 9):
        chain.append(rows(t))
    file.write_bytes(file.read_bytes()[:-200])
    with caplog.at_level(logging.WARNING):
        chain.cut_after(7)
    chain.append(rows(8))
    assert f"{file} is damaged" in caplog.text
    with pytest.raises(DataError, match=rf"{name} is damaged .* oialr spectra repair {path}"):
        open(path)
    before = files(tmp_path)
    with pytest.raises(DataError, match=f"{name} is damaged"):
        merge(path)
    assert files(tmp_path) == before
    chain.join_flushes = 1
    chain.append(rows(9))
    assert file.exists()
    assert steps_in(max(tmp_path.iterdir()))[-1] == 9


@pytest.mark.parametrize("kind", ["flushes", "segments"])
def test_a_missing_file_is_named(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpc_oialr.spectra.reader._PAUSE_S", 0)
    written(tmp_path / "spectra.h5", range(1, 7), **KINDS[kind])
    for number, name in ((2, "spectra.h5.002"), (0, "spectra.h5")):
        next(tmp_path.glob(f"spectra.h5.{number:03d}*" if number or kind == "flushes" else "spectra.h5")).unlink()
        with pytest.raises(DataError, match=rf"{name} does not exist, or changes; it is a part of .*spectra.h5"):
            open(tmp_path)


def test_locks_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "spectra.h5"
    chain = written(path, range(1, 2), **SEGMENTS)
    with path.open("rb") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        chain.append(rows(2))
        assert steps_in(path) == [1, 2]
        merge(path)
    assert steps_in(path) == [1, 2]


def test_a_failed_join_leaves_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "spectra.h5"
    chain = written(path, range(1, 3))
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    monkeypatch.setattr(record_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        merge(path)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    monkeypatch.undo()
    monkeypatch.setattr(store, "_join", full)
    chain.join_flushes = 1
    with caplog.at_level(logging.INFO):
        chain.append(rows(3))
    assert "stay apart for now ([Errno 28] No space left on device)" in caplog.text
    assert steps_in(path) == [1, 2, 3]
