"""`--continue`: one command for the first job of a run and for all after it."""

from __future__ import annotations

import shutil

import pytest
import yaml
from support.tiny_runs import write_recipe
from support.train_workers import losses, stop_at_step

from hpc_oialr.cli.main import main
from hpc_oialr.distributed import World
from hpc_oialr.errors import OIALRError
from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.run import resume, train_or_resume
from hpc_oialr.train.timing import StopRequest

WORLD = World.single("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"), train={"steps": 12, "evaluations": 2})


@pytest.fixture(scope="module")
def stopped(recipe, tmp_path_factory):
    """A run that was stopped after its first checkpoint, before its second."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    assert train_or_resume(load_config(recipe), folder, world=WORLD, stop=stop_at_step(7)).summary is None
    return folder


def test_it_goes_on(recipe, stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    whole = train_or_resume(load_config(recipe), tmp_path / "whole", world=WORLD)
    result = train_or_resume(load_config(recipe, ["--checkpoint.every", "3"]), folder, world=WORLD)
    assert result.summary["weights_sha256"] == whole.summary["weights_sha256"]
    assert losses(folder) == losses(tmp_path / "whole")
    again = train_or_resume(load_config(recipe), folder, world=WORLD)
    assert again.summary == result.summary


def test_a_folder_of_an_earlier_version_goes_on(recipe, stopped, tmp_path, caplog):
    """Its config.yaml holds settings that are retired."""
    folder = shutil.copytree(stopped, tmp_path / "run")
    config = folder / "config.yaml"
    old = {"spectra_writer": "single", "side_folder": None}
    tree = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**tree, "record": {**tree["record"], **old}}))
    assert resume(folder, settings=["--record.side_folder", "null"], world=WORLD).summary["steps"] == 12
    assert "are ignored: record.side_folder from config.yaml" in caplog.text


def test_from_the_start_if_there_is_no_checkpoint(recipe, stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").mkdir()
    assert train_or_resume(load_config(recipe), folder, world=WORLD).summary["steps"] == 12
    assert len(losses(folder)) == 12


def test_another_run_is_an_error(recipe, stopped):
    over = ["--optimizer.lr", "0.5", "--train.device", "cpu", "--oialr", "null"]
    with pytest.raises(OIALRError, match=r"holds a run with other settings: optimizer.lr is 0.02 there, 0.5 here") as e:
        train_or_resume(load_config(recipe, over), stopped, world=WORLD)
    assert "more); only these may differ: engine, train.device, " in str(e.value)
    assert str(e.value).endswith(f"go on with the run as it is: oialr resume {stopped}")


def test_the_end_of_the_job_stops_it_with_a_checkpoint(recipe, tmp_path, capsys):
    """The deadline is so near that the first step is the last one."""
    stop = StopRequest(deadline=0.0)
    assert train_or_resume(load_config(recipe), tmp_path / "run", world=WORLD, stop=stop).summary is None
    assert len(losses(tmp_path / "run")) == 1
    assert (tmp_path / "run" / "checkpoints" / "step_00000001").is_dir()
    shown = capsys.readouterr().err
    assert "ETA" in shown
    assert "of 0:00 left in the job" in shown
    assert "stopped after step 1: " in shown


def test_the_command_line(recipe, tmp_path, capsys):
    words = ["train", str(recipe), "--out", str(tmp_path / "run"), "--continue"]
    assert main([*words, "--train.steps", "3"]) == 0
    assert main([*words, "--train.steps", "3"]) == 0
    assert main([*words, "--train.steps", "4"]) == 2
    assert "train.steps is 3 there, 4 here" in capsys.readouterr().err
    assert main(["train", str(recipe), "--continue"]) == 2
    assert "--continue needs --out DIR" in capsys.readouterr().err


def test_dense_from_the_command_line(recipe, capsys):
    assert main(["train", str(recipe), "--dense", "--print_config"]) == 0
    assert "oialr: null" in capsys.readouterr().out


def test_the_published_method_from_the_command_line(capsys):
    assert main(["train", "vit_b16", "--paper", "--print_config"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree["oialr"]["rule"] == {"class_path": "RelativeCutoff", "init_args": {"beta": 0.2}}
    assert (tree["oialr"]["importance"], tree["optimizer"]["class_path"]) == ("weights", "AdamW")
