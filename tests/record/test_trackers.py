"""Experiment trackers, the real libraries, offline: what a run sends, its resume, and failures that end nothing."""

from __future__ import annotations

import json
import logging
import sqlite3
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch

from hpc_oialr.errors import MissingExtraError, OIALRError, UnknownNameError
from hpc_oialr.method.report import UpdateReport, layer_update
from hpc_oialr.record import RunFolder, trackers
from hpc_oialr.record.trackers import RunTracker, check_tracker, require_tracker

pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("default")
SETTINGS = {"train.seed": 3, "oialr": None}


def report(step: int, r: int) -> UpdateReport:
    layers = [layer_update(name, (8, 6), 6, r, torch.ones(6), 0.1, stability=0.5) for name in ("a.0", "b")]
    return UpdateReport(t=step, kind="update", layers=tuple(layers), seconds=0.1, bytes_sent=0)


def track(name: str, folder: RunFolder, first: int, last: int) -> None:
    """Steps ``first`` to ``last`` of a run."""
    tracker = RunTracker(name, folder, SETTINGS, project="tests", step=first - 1)
    for step in range(first, last + 1):
        tracker.write({"step": step, "total_steps": 9, "loss": 1 / step, "lr": float("nan"), "metric_name": "x"})
    tracker.write({"step": last, "split": "test", "metric": 0.25})
    tracker.update({"step": last, "kind": "update", "r_mean": 3.0}, report(last, 4))
    tracker.close()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_of_a_resumed_run_is_that_of_one_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = RunFolder(tmp_path).create()
    track("tensorboard", folder, 1, 3)
    track("tensorboard", folder, 3, 4)
    found = scalars(folder.logs)
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4], "step 3 of the first run is hidden"
    assert found.keys() == {
        *("train/loss", "test/metric", "update/r_mean", "r/a.0", "r/b", "stability/a.0", "stability/b"),
    }
    assert found["r/b"] == [(4, 4.0)]


def test_wandb_offline_in_a_job_continues_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("WANDB_MODE", "to be restored")
    monkeypatch.delenv("WANDB_MODE")
    folder = RunFolder(tmp_path / "my-run").create()
    track("wandb", folder, 1, 2)
    first = json.loads((folder.path / "tracker.json").read_text())
    track("wandb", folder, 3, 4)
    assert json.loads((folder.path / "tracker.json").read_text()) == first
    runs = sorted((folder.logs / "wandb").glob("offline-run-*"))
    assert [run.name.rpartition("-")[2] for run in runs] == [first["id"]] * 2
    content = b"".join(path.read_bytes() for path in runs[0].glob("*.wandb"))
    assert all(name in content for name in (b"train/loss", b"r/a.0", b"stability/b", b"train.seed"))
    assert b"my-run" in content


class Failing:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.calls: list[str] = []

    def start(self) -> None:
        pass

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        assert values == {"train.seed": 3}

    def log(self, values: dict[str, Any], step: int) -> None:
        raise ConnectionError("no route to host")


def test_mlflow_continues_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    folder = RunFolder(tmp_path).create()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder.logs / 'mlflow.db'}")
    track("mlflow", folder, 1, 3)
    track("mlflow", folder, 3, 4)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert run.info.run_id == json.loads((tmp_path / "tracker.json").read_text())["id"]
    assert run.info.status == "FINISHED"
    assert run.data.params == {"train.seed": "3"}
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3, 3, 4]
    assert run.data.metrics["r/a.0"] == 4


def test_trackio_continues_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    folder = RunFolder(tmp_path / "run").create()
    track("trackio", folder, 1, 3)
    track("trackio", folder, 3, 4)
    with sqlite3.connect(tmp_path / "trackio/tests.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in rows} == {"run"}
    assert [step for _, step, values in rows if "train/loss" in json.loads(values)] == [1, 2, 3, 3, 4]
    assert json.loads(rows[-1][2])["r/b"] == 4


def test_comet_offline_in_a_job_keeps_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("comet_ml")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for name in ("COMET_START_ONLINE", "COMET_OFFLINE_DIRECTORY"):
        monkeypatch.setenv(name, "")  # undone at the end, whatever the tracker sets
        monkeypatch.delenv(name)
    folder = RunFolder(tmp_path).create()
    track("comet", folder, 1, 3)
    track("comet", folder, 3, 4)
    archives = [json.loads(ZipFile(path).read("experiment.json")) for path in folder.logs.glob("*.zip")]
    key = json.loads((tmp_path / "tracker.json").read_text())["id"]
    assert [(each["offline_id"], each["resume_strategy"]) for each in archives] == [(key, "get_or_create")] * 2


def test_a_tracker_that_fails_is_said_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from accelerate import tracking

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Failing)
    with caplog.at_level(logging.WARNING):
        track("wandb", RunFolder(tmp_path).create(), 1, 3)
        (tmp_path / "tracker.json").write_text("{")
        track("wandb", RunFolder(tmp_path).create(), 1, 3)
    assert [line.partition(" (")[0] for line in caplog.messages] == [
        "the tracker wandb failed to log and gets nothing more",
        "the tracker wandb failed to start and gets nothing more",
    ]
    assert f"no route to host); the run goes on, and {tmp_path} has all numbers" in caplog.text


def test_what_is_missing_is_named_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="unknown record.tracker 'wandbb'; .*Did you mean 'wandb'"):
        check_tracker("wandbb")
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "comet_ml" else name)
    with pytest.raises(OIALRError, match="record.tracker is 'comet', .*pip install comet_ml"):
        require_tracker("comet")
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"needs accelerate. .*hpc_oialr\[trackers\]"):
        require_tracker("wandb")
