"""The file that grows by renames: whole at every moment, cut and joined without loss."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from support.spectra_reports import ATTRIBUTES, NAMES, content, report, step_row, steps_in

from hpc_oialr.errors import DataError
from hpc_oialr.spectra import memory_file, open
from hpc_oialr.spectra.join import join
from hpc_oialr.spectra.layout import append, describe
from hpc_oialr.spectra.memory_file import Image
from hpc_oialr.spectra.rows import Event, Rows, steps_of, together
from hpc_oialr.spectra.segments import SegmentedFile

LAST = 24
PLACES = {name: place for place, name in enumerate(NAMES)}


def rows(t: int) -> Rows:
    event = Event.of(report(t, names=NAMES[:2]), lambda _: True).rows(PLACES)
    return together([event, steps_of([step_row(t)])])


def size_of(count: int) -> int:
    """Bytes of a head with so many rows."""
    head = Image()
    describe(head.file, ATTRIBUTES)
    for t in range(1, count + 1):
        append(head, rows(t))
    return len(head.content())


SMALL, TINY = size_of(4), size_of(2)


def written(path: Path, steps: range, head_bytes: int = SMALL) -> SegmentedFile:
    file = SegmentedFile(path, ATTRIBUTES, head_bytes=head_bytes)
    for t in steps:
        file.append(rows(t))
    return file


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed") / "spectra.h5"
    written(path, range(1, LAST + 1), head_bytes=2**23)
    return path


def test_a_head_that_is_full_becomes_a_segment(tmp_path: Path, undisturbed: Path) -> None:
    path = tmp_path / "spectra.h5"
    file = written(path, range(1, LAST + 1))
    names = files(tmp_path)
    assert len(names) == LAST // 4 or len(names) == LAST // 4 + 1
    assert names == ["spectra.h5", *(f"spectra.h5.{i:03d}" for i in range(1, len(names)))]
    assert all((tmp_path / name).stat().st_size >= SMALL for name in names[1:-1])
    assert content(path) == content(undisturbed)
    assert steps_in(tmp_path / names[1])[0] == 1, "a segment can be read alone"
    file.join()
    assert files(tmp_path) == ["spectra.h5"]
    assert content(path) == content(undisturbed)


@pytest.mark.parametrize("t", [0, 1, 7, LAST - 1, LAST, LAST + 9])
def test_cutting_over_segments(tmp_path: Path, undisturbed: Path, t: int) -> None:
    path = tmp_path / "spectra.h5"
    written(path, range(1, LAST + 1))
    again = SegmentedFile(path, ATTRIBUTES, head_bytes=SMALL)
    again.cut_after(t)
    with open(path) as run:
        assert [layer.t.tolist() for layer in run.values()] == [list(range(1, min(t, LAST) + 1))] * len(run)
        assert run.steps["step"].tolist() == list(range(1, min(t, LAST) + 1))
    for step in range(t + 1, LAST + 1):
        again.append(rows(step))
    assert content(path) == content(undisturbed)


def test_a_joined_file_is_gone_on_with_as_a_segment(tmp_path: Path, undisturbed: Path) -> None:
    path = tmp_path / "spectra.h5"
    written(path, range(1, 19)).join()
    again = SegmentedFile(path, ATTRIBUTES, head_bytes=path.stat().st_size // 2)
    again.cut_after(15)
    assert steps_in(path) == list(range(1, 16))
    for t in range(16, LAST + 1):
        again.append(rows(t))
    assert "spectra.h5.001" in files(tmp_path)
    assert content(path) == content(undisturbed)


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    written(tmp_path / "spectra.h5", range(1, LAST + 1))
    assert len(files(tmp_path)) > 3
    assert content(tmp_path) == content(undisturbed)


def test_with_images_that_have_a_wrong_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path
) -> None:
    """As HDF5 1.10 makes them: the head is closed and opened anew for each row."""
    monkeypatch.setattr(memory_file, "images_are_whole", lambda: False)
    file = written(tmp_path / "spectra.h5", range(1, 19))
    file.cut_after(12)
    for t in range(13, LAST + 1):
        file.append(rows(t))
    assert content(tmp_path) == content(undisturbed)


def test_rows_after_a_merge_by_another_process(tmp_path: Path, undisturbed: Path) -> None:
    path = tmp_path / "spectra.h5"
    file = written(path, range(1, 19))
    SegmentedFile(path, ATTRIBUTES).join()
    assert files(tmp_path) == ["spectra.h5"]
    for t in range(19, LAST + 1):
        file.append(rows(t))
    assert content(path) == content(undisturbed)


class Camera:
    """Copies a folder before every operation of the file system: what a process that is gone then would leave."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, album: Path) -> None:
        self.folder, self.album, self.done = folder, album, 0
        self.pictures: list[tuple[Path, int]] = []
        for owner, name in ((Path, "open"), (Path, "replace"), (Path, "unlink"), (os, "link"), (os, "fsync")):
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
    file = SegmentedFile(path, ATTRIBUTES, head_bytes=TINY)
    for t in range(1, 5):
        file.append(rows(t))
        yield t
    yield 2
    file.cut_after(2)
    for t in range(3, 6):
        file.append(rows(t))
        yield t
    file.join()


def test_a_crash_between_any_two_operations_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, album, expected = tmp_path / "run", tmp_path / "album", tmp_path / "expected.h5"
    written(expected, range(1, 6), head_bytes=2**23)
    folder.mkdir()
    album.mkdir()
    with monkeypatch.context() as context:
        camera = Camera(context, folder, album)
        for t in life(folder / "spectra.h5"):
            camera.done = t
    assert len(camera.pictures) > 40, "the test met too few operations"
    for picture, done in camera.pictures:
        path = picture / "spectra.h5"
        found = steps_in(path) if path.exists() else []
        assert found == list(range(1, len(found) + 1))
        assert len(found) >= done
        again = SegmentedFile(path, ATTRIBUTES, head_bytes=SMALL)
        again.cut_after(2)
        for t in range(min(done, 2) + 1, 6):
            again.append(rows(t))
        again.join()
        assert content(path) == content(expected), picture


@pytest.mark.parametrize("damage", ["truncated", "empty", "bit", "text"])
def test_a_damaged_head_is_moved_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    path = tmp_path / "spectra.h5"
    written(path, range(1, 3))
    whole = bytearray(path.read_bytes())
    if damage == "bit":
        whole[whole.index(np.float64(2e-7).tobytes())] ^= 1
    path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "bit": whole}.get(damage, b"no"))
    file = SegmentedFile(path, {"seed": 4}, head_bytes=SMALL)
    with caplog.at_level(logging.WARNING):
        file.append(rows(3))
    assert "damaged" in caplog.text
    assert f"oialr spectra repair {path}" in caplog.text
    assert "It was moved to spectra.h5.damaged1, and a new file begun" in caplog.text
    assert files(tmp_path) == ["spectra.h5", "spectra.h5.damaged1"]
    assert steps_in(path) == [3]
    with open(path) as run:
        assert run.attributes["seed"] == 4


def test_a_damaged_segment_does_not_stop_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, segment = tmp_path / "spectra.h5", tmp_path / "spectra.h5.001"
    written(path, range(1, 19))
    segment.write_bytes(segment.read_bytes()[:5000])
    file = SegmentedFile(path, ATTRIBUTES, head_bytes=SMALL)
    with caplog.at_level(logging.WARNING):
        file.cut_after(16)
    file.append(rows(17))
    assert f"{segment} is damaged" in caplog.text
    with pytest.raises(DataError, match=r"spectra.h5.001 is damaged .* oialr spectra repair"):
        open(path)
    before = files(tmp_path)
    with pytest.raises(DataError, match="spectra.h5.001 is damaged"):
        file.join()
    assert files(tmp_path) == before


def test_a_missing_segment_is_named(tmp_path: Path) -> None:
    written(tmp_path / "spectra.h5", range(1, 19))
    (tmp_path / "spectra.h5.001").unlink()
    with pytest.raises(DataError, match=r"spectra.h5.001 does not exist; it is a part of .*spectra.h5"):
        open(tmp_path)


def test_locks_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "spectra.h5"
    file = written(path, range(1, 2))
    with h5py.File(path, "a", locking=True):
        file.append(rows(2))
        assert steps_in(path) == [1, 2]


def test_a_failed_join_leaves_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "spectra.h5"
    written(path, range(1, 3))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        join([path], path)
    assert path.read_bytes() == before
