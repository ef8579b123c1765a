"""A checkpoint belongs to its run, and nothing but a checkpoint and the settings is needed to go on."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from support.tiny_runs import write_recipe
from support.train_workers import losses, stop_at_step

from hpc_oialr.distributed import World
from hpc_oialr.errors import CheckpointError, FolderLostError
from hpc_oialr.record.owner import Claim, FolderInUseError
from hpc_oialr.record.run_folder import RunFolder
from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.run import resume, train, train_or_resume
from hpc_oialr.train.same_run import differing, fixed_settings, stored
from hpc_oialr.train.timing import StopRequest

WORLD = World.single("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"), train={"steps": 10, "evaluations": 2})


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    return train(load_config(recipe), tmp_path_factory.mktemp("whole") / "run", world=WORLD)


@pytest.fixture(scope="module")
def stopped_once(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped") / "run"
    assert train(load_config(recipe), folder, world=WORLD, stop=stop_at_step(7)).summary is None
    return folder


@pytest.fixture
def stopped(stopped_once, tmp_path):
    return shutil.copytree(stopped_once, tmp_path / "run")


def edit(folder: Path, **over: object) -> None:
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    for name, value in over.items():
        *sections, last = name.split("__")
        place = tree
        for section in sections:
            place = place[section]
        place[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"train__seed": 1}, r"train\.seed was 0 then and is 1 now\. Put the value in config\.yaml back"),
        ({"optimizer__init_args__lr": 0.5}, r"optimizer\.lr was 0\.02 then and is 0\.5 now"),
        ({"model__init_args__dim": 32}, r"model\.dim was 16 then and is 32 now"),
        ({"oialr": None}, r"oialr\..* was .* then and is not set now \(and \d+ more\)"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(stopped, over, message):
    edit(stopped, **over)
    with pytest.raises(CheckpointError, match=f"step_00000007 is of another run: {message}"):
        resume(stopped, world=WORLD)


def test_settings_edited_before_the_first_checkpoint_are_noticed(recipe, stopped, whole, caplog):
    for step in (5, 7):
        shutil.rmtree(stopped / "checkpoints" / f"step_{step:08d}")
    edit(stopped, optimizer__init_args__lr=0.5)
    with pytest.raises(CheckpointError, match=r"settings\.json is of another run: optimizer\.lr was 0\.02 then"):
        resume(stopped, world=WORLD)
    edit(stopped, optimizer__init_args__lr=0.02)
    (stopped / "checkpoints" / "settings.json").write_bytes(b"\0" * 100)
    assert resume(stopped, world=WORLD).summary["weights_sha256"] == whole.summary["weights_sha256"]
    assert "settings.json is damaged" in caplog.text


def test_what_may_change_may(stopped, whole, tmp_path):
    """Another place of the data, other checkpoints; the settings of the dense baseline are another run's."""
    old = yaml.safe_load((stopped / "config.yaml").read_text())["data"]["init_args"]["path"]
    moved = shutil.copytree(old, tmp_path / "moved")
    edit(stopped, data__init_args__path=str(moved), checkpoint__every=3, dense={"train": {"steps": 3}})
    result = resume(stopped, world=WORLD)
    assert result.summary["weights_sha256"] == whole.summary["weights_sha256"]
    (stopped / "summary.json").unlink()
    (moved / "00.txt").write_text("More words than there were before. " * 40)
    with pytest.raises(CheckpointError, match=r"is of a run on other data: [\d,]+ training samples then, [\d,]+ now"):
        resume(stopped, world=WORLD)


def test_checkpoints_of_older_versions_tell_their_seed_only(stopped):
    path = stopped / "checkpoints" / "step_00000007"
    state = json.loads((path / "state.json").read_text())
    assert set(state["settings"]) == {"sha256", "values"}
    del state["settings"], state["samples"]
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = hashlib.sha256((path / "state.json").read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    edit(stopped, train__seed=3)
    with pytest.raises(CheckpointError, match=r"train\.seed was 0 then and is 3 now"):
        resume(stopped, world=WORLD)
    edit(stopped, train__seed=0, model__init_args__dim=32)
    tensors = r"transformer.wte.weight is 256 x 16 torch.float32 there, 256 x 32 torch.float32 here"
    with pytest.raises(CheckpointError, match=f"is of another model: {tensors}"):
        resume(stopped, world=WORLD)
    edit(stopped, model__init_args__dim=16)
    assert resume(stopped, world=WORLD).summary["steps"] == 10


def test_settings_that_came_with_a_version_do_not_count(recipe):
    now = fixed_settings(load_config(recipe).tree)
    then = {name: value for name, value in now.items() if name != "train.early_stopping"}
    assert differing(then, now) == []
    assert differing({**then, "train.seed": 4}, now) == ["train.seed"]
    kept = [stored({**now, "data.token": secret})["values"] for secret in ("hush", "whist")]
    assert "hush" not in str(kept)
    assert differing(*kept) == ["data.token"]
    assert "engine.class_path" not in now
    assert "checkpoint.every" not in now


def test_nothing_else_is_needed_to_go_on(stopped, whole, caplog):
    """A damaged line, no logs, no environment, a summary that is a block of zeros."""
    rows = (stopped / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_bytes(b"".join([*rows[:2], b"\0" * 4096 + b"\n", *rows[3:]]))
    (stopped / "updates.jsonl").unlink()
    (stopped / "updates.jsonl").mkdir()
    (stopped / "environment.json").unlink()
    (stopped / "summary.json").write_bytes(b"\0" * 100)
    shutil.rmtree(stopped / "logs")
    result = resume(stopped, world=WORLD)
    assert result.summary["weights_sha256"] == whole.summary["weights_sha256"]
    assert f"line 3 of {stopped / 'metrics.jsonl'}: no JSON object with a step; left out." in caplog.messages
    assert (stopped / "updates.jsonl.aside0").is_dir()
    expected = losses(whole.folder)
    assert losses(stopped) == [*expected[:2], *expected[3:]]
    assert json.loads((stopped / "environment.json").read_text())["packages"]["torch"]
    assert (stopped / "logs" / "process_0.log").exists()
    # Made anew, the same.
    (stopped / "summary.json").unlink()
    assert resume(stopped, world=WORLD).summary["weights_sha256"] == whole.summary["weights_sha256"]


def test_a_run_whose_folder_is_removed_is_an_error(recipe, tmp_path):
    """Not after hours: at its next checkpoint."""
    folder, steps = tmp_path / "run", []

    def asked() -> str:
        steps.append(len(steps) + 1)
        if len(steps) == 2:
            shutil.rmtree(folder)
        return ""

    with pytest.raises(FolderLostError, match=r"was removed while its run was going on; step 5 cannot be saved"):
        train(load_config(recipe), folder, world=WORLD, stop=StopRequest(asked))
    assert len(steps) == 5
    assert not folder.exists()


def test_a_folder_in_use_is_left_alone_and_one_that_was_taken_too(recipe, stopped):
    folder = RunFolder(stopped)
    files = sorted(stopped.rglob("*"))
    with closing(Claim("oialr train").take(folder)):
        with pytest.raises(FolderInUseError, match=r"is in use by process \d+ on .* \(oialr train, since"):
            resume(stopped, world=WORLD)
        with pytest.raises(FolderInUseError):
            train_or_resume(load_config(recipe), stopped, world=WORLD)
    assert sorted(stopped.rglob("*")) == files

    def asked() -> str:
        owner = json.loads(folder.owner.read_text())
        folder.owner.write_text(json.dumps({**owner, "token": "another", "host": "far"}))
        return ""

    with pytest.raises(FolderLostError, match=r"was taken by process \d+ on far .*; step 10 cannot be saved"):
        resume(stopped, world=WORLD, stop=StopRequest(asked))
    assert not (stopped / "checkpoints" / "step_00000010").exists()
