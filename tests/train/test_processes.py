"""One path for 1..N processes: same batches, same r, same losses; checkpoints of any number for any number."""

from __future__ import annotations

import pytest
from support.spawn import spawn
from support.tiny_runs import write_recipe
from support.train_workers import losses, resume_worker, train_worker

from hpc_oialr.distributed import World
from hpc_oialr.errors import ConfigError
from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.run import resume, train

NO_DROPOUT = {"init_args": {"dropout": 0.0}}


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    recipe = write_recipe(folder, model=NO_DROPOUT, train={"precision": "float64", "steps": 16, "evaluations": 2})
    return recipe, train(load_config(recipe), folder / "run", world=World.single("cpu"))


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_same_r_and_losses(single, tmp_path, size):
    recipe, alone = single
    summaries = spawn(train_worker, size, str(recipe), str(tmp_path / "run"))
    assert {summary["weights_sha256"] for summary in summaries} == {summaries[0]["weights_sha256"]}
    assert summaries[0]["r"] == alone.summary["r"]
    assert summaries[0]["world_size"] == size
    assert losses(tmp_path / "run") == pytest.approx(losses(alone.folder), rel=1e-9)
    assert summaries[0]["metric"] == pytest.approx(alone.summary["metric"], rel=1e-9)


@pytest.mark.parametrize(("size", "stop_at"), [(2, 11), pytest.param(4, 10, marks=pytest.mark.long)])
def test_resume_of_several_is_bitwise(tmp_path, size, stop_at):
    """With dropout, whose generators each process has of its own, at steps at which no checkpoint is due."""
    recipe = write_recipe(tmp_path, train={"steps": 16, "evaluations": 2})
    whole = spawn(train_worker, size, str(recipe), str(tmp_path / "whole"))
    assert spawn(train_worker, size, str(recipe), str(tmp_path / "run"), stop_at) == [None] * size
    resumed = spawn(resume_worker, size, str(tmp_path / "run"))
    assert {s["weights_sha256"] for s in resumed} == {whole[0]["weights_sha256"]}
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_resume_on_another_world_size(single, tmp_path):
    recipe, alone = single
    assert spawn(train_worker, 2, str(recipe), str(tmp_path / "run"), 12) == [None, None]
    resumed = resume(tmp_path / "run", world=World.single("cpu"))
    assert resumed.summary["r"] == alone.summary["r"]
    assert losses(tmp_path / "run") == pytest.approx(losses(alone.folder), rel=1e-9)


def test_world_size_that_does_not_divide_the_batch(tmp_path):
    recipe = write_recipe(tmp_path, train={"global_batch": 9})
    with pytest.raises(
        Exception, match=r"train.global_batch is 9; must be a positive multiple of the world size, which is 2"
    ):
        spawn(train_worker, 2, str(recipe), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_accumulation_that_does_not_divide_the_share(tmp_path):
    recipe = write_recipe(tmp_path, train={"accumulation": 3})
    with pytest.raises(ConfigError, match=r"train.accumulation is 3; must divide the 8 samples that each of 1 ranks"):
        train(load_config(recipe), tmp_path / "run", world=World.single("cpu"))
