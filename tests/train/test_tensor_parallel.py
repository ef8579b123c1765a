"""A whole run with each layer split over two processes: its losses, its checkpoint, its resumption."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.spawn import spawn
from support.tiny_runs import write_recipe
from support.train_workers import losses, resume_worker, train_worker

from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.run import resume, train

STOP_AT = 13
BY_WEIGHTS = {"importance": "weights"}  # as there: one process would see whole inputs
ENGINE = {"class_path": "TensorParallel", "init_args": {"size": 2}}
SHORT = {"steps": 16, "evaluations": 1}


def test_a_run_on_two_processes(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    train(load_config(str(write_recipe(tmp_path / "alone", oialr=BY_WEIGHTS, train=SHORT))), tmp_path / "one")
    recipe = write_recipe(tmp_path, engine=ENGINE, train=SHORT)
    spawn(train_worker, 2, str(recipe), str(tmp_path / "whole"))
    spawn(train_worker, 2, str(recipe), str(tmp_path / "parts"), STOP_AT)
    spawn(resume_worker, 2, str(tmp_path / "parts"))
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "parts") == whole, "a resumed run goes on with the same bits"
    # Dropout's masks are those of one process, because all that is dropped is whole.
    assert whole == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


def test_its_checkpoint_goes_on_with_one_process(tmp_path: Path) -> None:
    model = {"init_args": {"dropout": 0.0}}
    recipe = write_recipe(tmp_path, engine=ENGINE, model=model, oialr=BY_WEIGHTS, train=SHORT)
    train(load_config(str(recipe)), tmp_path / "one")
    spawn(train_worker, 2, str(recipe), str(tmp_path / "two"), STOP_AT)
    resume(tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
