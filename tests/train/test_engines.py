"""Checkpoints are interchangeable: written under one engine, read under another."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.spawn import spawn
from support.tiny_runs import write_recipe
from support.train_workers import losses, resume_worker, stop_at_step, train_worker

from benchmarks.worlds import ENGINES
from hpc_oialr.distributed import World
from hpc_oialr.errors import OIALRError
from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.run import resume, train

STOP_AT = 12
HERE = [name for name in ENGINES if not name.startswith("zero") or find_spec("deepspeed")]
# Stage 2 writes what stage 1 does, each process its part of flat fp32 masters.
SHORT = [name for name in HERE if name != "zero2"]


def write_all(rank: int, size: int, recipe: str, folder: str, names: list[str]) -> None:
    """One stopped run with each engine, all in one process group."""
    world = World.from_environment(device="cpu", timeout_s=60)
    for name in names:
        loaded = load_config(recipe, ENGINES[name])
        train(loaded, Path(folder) / name, world=world, stop=stop_at_step(STOP_AT))


def read_all(rank: int, size: int, folder: str, names: list[str]) -> None:
    """Each goes on with the next engine of the list."""
    world = World.from_environment(device="cpu", timeout_s=60)
    for writer, reader in zip(names, names[1:] + names[:1], strict=True):
        resume(Path(folder) / writer, settings=ENGINES[reader], world=world)


@pytest.fixture(scope="module", params=[SHORT, pytest.param(HERE, marks=pytest.mark.long)], ids=["short", "all"])
def names(request):
    return request.param


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, names):
    """A run of one process, and one of two processes with each engine, stopped between two cuts."""
    folder = tmp_path_factory.mktemp("engines")
    optimizer = {"class_path": "AdamW", "init_args": {"lr": 1e-3}}
    # Under tensor parallelism bases are chosen by the weights.
    method, model = {"importance": "weights"}, {"init_args": {"dropout": 0.0}}
    short = {"train": {"steps": 16, "evaluations": 1}, "checkpoint": {"every": None}}
    recipe = write_recipe(folder, model=model, optimizer=optimizer, oialr=method, **short)
    train(load_config(recipe), folder / "single", world=World.single("cpu"))
    spawn(write_all, 2, str(recipe), str(folder), names)
    return folder


def test_every_engine_reads_another_ones_checkpoint(stopped, names, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    spawn(read_all, 2, str(tmp_path), names)
    for name in names:
        assert losses(tmp_path / name) == pytest.approx(losses(stopped / "single"), rel=1e-3), name


def test_one_process_reads_every_engines_checkpoint(stopped, names, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    for name in names:
        resume(tmp_path / name, world=World.single("cpu"))
        assert losses(tmp_path / name) == pytest.approx(losses(stopped / "single"), rel=1e-3), name


def goes_on(rank: int, size: int, recipe: str, folder: str) -> None:
    train_worker(rank, size, recipe, f"{folder}/whole")
    train_worker(rank, size, recipe, f"{folder}/parts", STOP_AT)
    resume(Path(folder) / "parts", settings=["--engine.frozen", "replicated"], stop=stop_at_step(5))
    resume_worker(rank, size, f"{folder}/parts")


def test_fsdp_resumes_bitwise(tmp_path):
    """With dropout and Muon, on two processes; wherever the bases are stored."""
    recipe = write_recipe(tmp_path, engine={"class_path": "FSDP"}, train={"steps": 20, "evaluations": 1})
    spawn(goes_on, 2, str(recipe), str(tmp_path))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_resumed_run_stays_the_same_run(stopped):
    with pytest.raises(OIALRError, match=r"optimizer.lr cannot change when a run is resumed; .* engine, train"):
        resume(stopped / "ddp", settings=["--optimizer.lr", "1"])
