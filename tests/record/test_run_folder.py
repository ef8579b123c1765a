"""The run folder: private, and its files whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hpc_oialr.outputs import OutputError
from hpc_oialr.record import RunFolder
from hpc_oialr.record.files import write_atomically


def test_folders_are_their_owners(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "shared" / "a run").create()
    for path in (folder.path, folder.checkpoints, folder.logs):
        assert path.stat().st_mode & 0o777 == 0o700
    assert folder.create().path == folder.path


def test_names() -> None:
    folder = RunFolder(Path("x"))
    files = (folder.config, folder.environment, folder.metrics, folder.spectra, folder.summary)
    assert [file.name for file in files] == [
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "spectra.h5",
        "summary.json",
    ]
    assert (folder.checkpoints.name, folder.logs.name) == ("checkpoints", "logs")


def test_files_come_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run").create()
    assert not folder.holds_run
    folder.write_config("a: 1\n")
    folder.write_environment({"python": "3"})
    assert folder.holds_run
    assert not folder.finished
    folder.write_summary({"metric": float("nan"), "r": {"a": 3}, "path": tmp_path})
    assert folder.finished
    assert folder.config.read_text() == "a: 1\n"
    assert json.loads(folder.environment.read_text()) == {"python": "3"}
    assert folder.read_summary() == {"metric": None, "r": {"a": 3}, "path": str(tmp_path)}
    assert not list(folder.path.glob(".*")), "no temporary files stay"


@pytest.mark.parametrize("name", ["metrics.jsonl", "spectra.h5", "spectra.h5.000.npz"])
def test_a_folder_with_a_file_that_a_run_writes_is_refused(tmp_path: Path, name: str) -> None:
    folder = RunFolder(tmp_path)
    folder.require_new()
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(OutputError, match=f"{name} exists already, and a run would write over it"):
        folder.require_new()
    folder.write_config("a: 1")
    folder.require_new()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_a_file_in_place_of_the_logs_stops_nothing(tmp_path):
    (tmp_path / "logs").touch()
    RunFolder(tmp_path).create()
    assert (tmp_path / "checkpoints").is_dir()
