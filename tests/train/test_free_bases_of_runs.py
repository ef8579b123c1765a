"""Runs with phases in which U and Vh are trained: resumed within and across them, exported, clipped."""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch
from support.spawn import spawn
from support.tiny_runs import write_recipe
from support.train_workers import losses, resume_worker, stop_at_step, train_worker

from hpc_oialr.distributed import World
from hpc_oialr.lowrank import low_rank_layers
from hpc_oialr.record.memory import MemoryMeter
from hpc_oialr.serve.export import export
from hpc_oialr.serve.trained import load_model
from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.run import resume, train

WORLD = World.single("cpu")
# Converted after 6 steps, updated after 10, 14, 18, 22.
OVER = {
    "oialr": {"bases_trained": [[8, 16], [20, None]]},
    "optimizer": {"class_path": "MuonAdamW", "init_args": {"lr": 0.02, "bases_lr": 0.02}},
    "train": {"gradient_clip": 0.5},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"), **OVER)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    return train(load_config(recipe), tmp_path_factory.mktemp("whole") / "run", world=WORLD)


@pytest.mark.parametrize("at", [*(pytest.param(at, marks=pytest.mark.long) for at in (7, 17)), 12, 22])
def test_a_resumed_run_is_the_same_run(recipe, whole, tmp_path, at):
    assert train(load_config(recipe), tmp_path / "run", world=WORLD, stop=stop_at_step(at)).summary is None
    result = resume(tmp_path / "run", world=WORLD)
    assert result.summary["weights_sha256"] == whole.summary["weights_sha256"]
    assert losses(tmp_path / "run") == losses(whole.folder)


def test_the_phases_make_a_difference(whole, recipe, tmp_path):
    other = load_config(recipe, ["--oialr.bases_trained", "[]"])
    frozen = train(other, tmp_path / "run", world=WORLD)
    assert losses(frozen.folder)[:8] == losses(whole.folder)[:8]
    assert losses(frozen.folder)[9:] != losses(whole.folder)[9:]
    # The last phase is still open: the bases count as trained.
    assert whole.summary["trainable_params"] > frozen.summary["trainable_params"]
    assert whole.summary["dense_trainable_params"] == frozen.summary["dense_trainable_params"]


def test_exports_within_a_phase_have_orthonormal_bases(whole):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for form in ("dense", "lowrank"):
            export(whole.folder, form)
    assert all(layer.bases_error() < 1e-5 for layer in low_rank_layers(load_model(whole.folder)).values())


def test_bases_are_clipped_with_the_rest(recipe, tmp_path, monkeypatch):
    """A norm is of all gradients, also in the first step of a phase."""
    counts = []
    clip = torch.nn.utils.clip_grad_norm_

    def count(parameters, norm):
        parameters = list(parameters)
        counts.append(sum(p.grad is not None for p in parameters))
        return clip(parameters, norm)

    monkeypatch.setattr("hpc_oialr.method.engine.clip_grad_norm_", count)
    result = train(load_config(recipe), tmp_path / "run", world=WORLD)
    layers = len(result.summary["r"])
    changes = {t: b - a for t, (a, b) in enumerate(pairwise(counts), 1) if a != b}
    assert changes == {8: 2 * layers, 16: -2 * layers, 20: 2 * layers}


def test_two_ranks_resume_within_a_phase(recipe, tmp_path):
    together = spawn(train_worker, 2, str(recipe), str(tmp_path / "whole"))
    spawn(train_worker, 2, str(recipe), str(tmp_path / "run"), 11)
    resumed = spawn(resume_worker, 2, str(tmp_path / "run"))
    assert resumed[0]["weights_sha256"] == together[0]["weights_sha256"]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_memory_of_a_phase_is_measured(recipe, tmp_path, monkeypatch):
    probed = []
    probe = MemoryMeter.probe

    def note(meter):
        probed.append(meter)
        return probe(meter)

    def steps_of(*settings):
        probed.clear()
        train(load_config(recipe, settings), tmp_path / str(len(settings)), world=WORLD)
        return len(probed)

    monkeypatch.setattr(MemoryMeter, "probe", note)
    # The first two steps of two phases, of which one is the step of the first update.
    assert steps_of() - steps_of("--oialr.bases_trained", "[]") == 3
