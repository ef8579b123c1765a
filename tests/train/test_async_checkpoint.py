"""Checkpoints written beside the training: of the right step, one at a time, complete or not there."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.spawn import spawn
from support.tiny_runs import write_recipe
from support.train_workers import losses, resume_worker, stop_at_step, train_worker
from torch.distributed.checkpoint.staging import DefaultStager

from hpc_oialr.distributed import World
from hpc_oialr.errors import CheckpointError, FolderLostError
from hpc_oialr.record import RunFolder
from hpc_oialr.train import async_checkpoint
from hpc_oialr.train.async_checkpoint import own_share
from hpc_oialr.train.checkpoint_store import CheckpointStore
from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.run import resume, train
from hpc_oialr.train.trainer import Trainer

WORLD = World.single("cpu")
MINE = CheckpointStore.save


def recipe(folder: Path, asynchronous: bool = True, **over: Any) -> Path:
    folder.mkdir(exist_ok=True)
    return write_recipe(folder, checkpoint={"every": 5, "keep": 9, "asynchronous": asynchronous}, **over)


class Watched:
    """Steps and writes of a run in order; a write waits until ``hold`` later steps are done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, hold: int = 0) -> None:
        self.seen: list[str] = []
        self.going = threading.Condition()
        step = Trainer._step

        def watched_step(trainer: Trainer, batch: Any) -> None:
            step(trainer, batch)
            with self.going:
                self.seen.append(f"step {trainer.progress.step}")
                self.going.notify_all()

        def watched_save(store: CheckpointStore, at: int, tensors: Any, state: Any) -> None:
            if at % 5 == 0:
                with self.going:
                    assert self.going.wait_for(lambda: f"step {min(at + hold, 24)}" in self.seen, timeout=30)
            MINE(store, at, tensors, state)
            with self.going:
                self.seen.append(f"written {at}")

        monkeypatch.setattr(Trainer, "_step", watched_step)
        monkeypatch.setattr(CheckpointStore, "save", watched_save)


def stored(folder: Path) -> dict[int, tuple[dict[str, Any], dict[str, Any]]]:
    """Tensors and state of every checkpoint, without times and memory."""
    store, found = CheckpointStore(folder / "checkpoints", WORLD), {}
    for step in store.steps():
        assert store.damage(step) is None
        state = store.read_state(step)
        del state["clocks"], state["progress"]["checkpoint_s"], state["progress"]["peak_memory_gib"]
        found[step] = (store.read(step, ""), state | {"settings": None})
    return found


def test_a_stager_of_torch_2_11_that_closes_itself_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stage = DefaultStager.stage

    def stage_and_close(stager: DefaultStager, tensors: Any) -> Any:
        copies = stage(stager, tensors)
        stager.close()
        return copies

    monkeypatch.setattr(DefaultStager, "stage", stage_and_close)
    monkeypatch.setattr(async_checkpoint, "STAGERS_SERVE_ONCE", True)
    run = train(load_config(recipe(tmp_path)), tmp_path / "run", world=WORLD)
    assert list(stored(run.folder)) == [5, 10, 15, 20, 24]


def require_equal(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for step, (tensors, state) in expected.items():
        assert state == found[step][1]
        assert tensors.keys() == found[step][0].keys()
        assert all(torch.equal(t, found[step][0][name]) for name, t in tensors.items())


def test_the_training_goes_on_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps are done before a write begins, and what is written is that of the step before them."""
    train(load_config(recipe(tmp_path / "off", False)), tmp_path / "expected", world=WORLD)
    watched = Watched(monkeypatch, hold=3)
    result = train(load_config(recipe(tmp_path / "on")), tmp_path / "run", world=WORLD)
    require_equal(stored(result.folder), stored(tmp_path / "expected"))
    seen = watched.seen
    assert [int(each.split()[1]) for each in seen if each.startswith("written")] == [5, 10, 15, 20, 24]
    assert all(seen.index(f"step {at + 3}") < seen.index(f"written {at}") for at in (5, 10, 15, 20))
    assert result.summary is not None
    assert result.summary["steps"] == 24


def test_the_next_one_and_a_stop_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(load_config(recipe(tmp_path / "whole")), tmp_path / "expected", world=WORLD)
    watched = Watched(monkeypatch, hold=4)
    path = recipe(tmp_path / "on")
    stopped = train(load_config(path), tmp_path / "run", world=WORLD, stop=stop_at_step(14))
    assert stopped.summary is None
    seen = watched.seen
    assert seen.index("written 5") < seen.index("written 10") < seen.index("written 14")
    assert seen[-1] == "written 14"
    monkeypatch.undo()
    again = resume(tmp_path / "run", world=WORLD)
    assert again.summary is not None
    assert whole.summary is not None
    assert again.summary["weights_sha256"] == whole.summary["weights_sha256"]
    assert losses(again.folder) == losses(whole.folder)


def failing(monkeypatch: pytest.MonkeyPatch, error: CheckpointError, *steps: int) -> None:
    def save(store: CheckpointStore, at: int, tensors: Any, state: Any) -> None:
        if at in steps:
            raise error
        MINE(store, at, tensors, state)

    monkeypatch.setattr(CheckpointStore, "save", save)


def test_an_error_is_a_warning_until_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = load_config(recipe(tmp_path / "on"))
    failing(monkeypatch, CheckpointError("no room."), 10)
    with caplog.at_level(logging.WARNING, "hpc_oialr"):
        train(path, tmp_path / "run", world=WORLD)
    assert "step 10: no room. The training goes on." in caplog.text
    assert sorted(stored(tmp_path / "run")) == [5, 15, 20, 24]
    failing(monkeypatch, CheckpointError("no room."), 24)
    with pytest.raises(CheckpointError, match="no room"):
        train(path, tmp_path / "other", world=WORLD)
    # The one of the last step is tried once more.
    failing(monkeypatch, CheckpointError("no room."), 20)
    short = load_config(recipe(tmp_path / "short", train={"steps": 20}))
    with pytest.raises(CheckpointError, match="no room"):
        train(short, tmp_path / "short" / "run", world=WORLD)


def folder_goes(rank: int, size: int, path: str, folder: str) -> tuple[int, str]:
    """The run's folder is removed after step 11; the step at which this rank has stopped, and why."""
    step, done = Trainer._step, []

    def watched(trainer: Trainer, batch: Any) -> None:
        step(trainer, batch)
        done.append(trainer.progress.step)
        if trainer.progress.step == 11 and rank == 0:
            shutil.rmtree(folder, ignore_errors=True)

    Trainer._step = watched  # type: ignore[method-assign]
    try:
        train(load_config(path), Path(folder))
    except FolderLostError as error:
        return done[-1], str(error)
    finally:
        Trainer._step = step  # type: ignore[method-assign]
    return done[-1], ""


@pytest.mark.parametrize("size", [1, 2])
def test_a_lost_folder_ends_the_run_on_all_ranks_together(tmp_path: Path, size: int) -> None:
    words = str(recipe(tmp_path / "on")), str(tmp_path / "run")
    found = spawn(folder_goes, 2, *words) if size == 2 else [folder_goes(0, 1, *words)]
    assert len(set(found)) == 1
    (step, message), *_ = found
    assert 15 <= step <= 20
    assert "was removed while its run was going on; step 15 cannot be saved, and the run ends." in message


def with_and_without(rank: int, size: int, folder: str, engine: str) -> None:
    for asynchronous in (True, False):
        path = str(Path(folder) / str(asynchronous) / "tiny.yaml")
        train_worker(rank, size, path, f"{folder}/{engine}-{asynchronous}")
    train_worker(rank, size, str(Path(folder) / "True" / "tiny.yaml"), f"{folder}/{engine}-parts", 12)
    resume_worker(rank, size, f"{folder}/{engine}-parts")


@pytest.mark.parametrize("engine", ["DDP", pytest.param("FSDP", marks=pytest.mark.long)])
def test_two_ranks(tmp_path: Path, engine: str) -> None:
    for asynchronous in (True, False):
        recipe(tmp_path / str(asynchronous), asynchronous, engine={"class_path": engine})
    spawn(with_and_without, 2, str(tmp_path), engine)
    on, off, parts = (tmp_path / f"{engine}-{name}" for name in (True, False, "parts"))
    require_equal(stored(on), stored(off))
    assert losses(parts) == losses(on) == losses(off)
    digests = [json.loads((run / "summary.json").read_text())["weights_sha256"] for run in (on, off, parts)]
    assert len(set(digests)) == 1
    files = RunFolder(on).checkpoints / "step_00000024"
    assert len(list(files.glob("*.safetensors"))) == 2, "each rank writes its share"


def test_replicated_tensors_are_dealt_by_size() -> None:
    sizes = {"model.a": 8, "model.b": 3, "optimizer.c": 3, "model.d": 2, "oialr.x.moments.0": 50}
    tensors = {name: torch.zeros(size) for name, size in sizes.items()}
    shares = [own_share({**tensors, f"rng.{rank}.cpu": torch.zeros(9)}, World(rank, 2)) for rank in range(2)]
    assert [sorted(share) for share in shares] == [
        ["model.a", "oialr.x.moments.0", "rng.0.cpu"],
        ["model.b", "model.d", "oialr.x.moments.0", "optimizer.c", "rng.1.cpu"],
    ]
