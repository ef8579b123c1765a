from __future__ import annotations

import itertools
import json
import logging

import pytest
import torch
from support.tiny_runs import merged, write_recipe
from support.train_workers import stop_at_step

from hpc_oialr.distributed import World
from hpc_oialr.errors import CheckpointError, OIALRError
from hpc_oialr.record import read_metrics
from hpc_oialr.spectra import Spectra
from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.run import resume, train

SUMMARY_KEYS = {
    "metric", "metric_name", "wall_s", "update_wall_s", "trainable_params", "dense_trainable_params",
    "total_params", "peak_memory_gib", "r", "world_size", "seed", "eval_wall_s", "steps", "peak_rss_gib",
    "best_metric", "tokens_per_s", "weights_sha256", "recompilations",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder)
    return recipe, train(load_config(recipe), folder / "run", world=World.single("cpu"))


def test_run_folder_and_summary(finished):
    _, result = finished
    names = {path.name for path in result.folder.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "spectra.h5", "checkpoints", "logs"} <= names
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary == result.summary
    assert set(summary) >= SUMMARY_KEYS
    assert summary["metric_name"] == "test_bits_per_byte"
    assert summary["metric"] < 7.9
    assert 0 < summary["trainable_params"] < summary["dense_trainable_params"]
    assert summary["r"]
    assert all(0 < r <= 12 for r in summary["r"].values())
    assert summary["peak_memory_gib"] > 0


def test_metrics_and_spectra(finished):
    _, result = finished
    rows = read_metrics(result.folder / "metrics.jsonl")
    losses = [row for row in rows if "metric" not in row]
    evaluations = [row for row in rows if "metric" in row]
    assert [row["step"] for row in losses] == list(range(1, 25))
    assert [row["step"] for row in evaluations] == [6, 12, 18, 24, 24]
    assert losses[-1]["loss"] < losses[0]["loss"]
    assert all(a["wall_s"] <= b["wall_s"] for a, b in itertools.pairwise(rows))
    spectra = Spectra(result.folder)
    assert set(spectra) == set(result.summary["r"])
    assert next(list(layer.t) for layer in spectra.values()) == [6, 10, 14, 18, 22]


def test_effective_config_loads_to_the_same_run(finished):
    recipe, result = finished
    assert load_config(result.folder / "config.yaml").tree == load_config(recipe).tree


def test_the_test_set_at_the_best_validation_metric(tmp_path):
    """Also when the run is stopped right after the best evaluation and resumed."""
    recipe = write_recipe(tmp_path, train={"test_at_best": True, "steps": 12, "evaluations": 6})
    whole = train(load_config(recipe), tmp_path / "whole", world=World.single("cpu"))
    rows = [row for row in read_metrics(whole.folder / "metrics.jsonl") if "metric" in row]
    best = min((row for row in rows if row["split"] == "validation"), key=lambda row: row["metric"])
    (there,) = (row for row in rows if row["split"] == "test" and row["step"] == best["step"])
    found = whole.summary["test_at_best"]
    assert (found["step"], found["metric"], found["loss"]) == (best["step"], there["metric"], there["loss"])
    stop = stop_at_step(best["step"])
    assert train(load_config(recipe), tmp_path / "cut", world=World.single("cpu"), stop=stop).summary is None
    again = resume(tmp_path / "cut", world=World.single("cpu"))
    assert again.summary["test_at_best"] == found


def test_a_run_is_not_overwritten(finished):
    recipe, result = finished
    with pytest.raises(OIALRError, match="already holds a run. Go on with it: oialr resume"):
        train(load_config(recipe), result.folder, world=World.single("cpu"))


def test_resuming_a_finished_run_gives_its_summary(finished):
    _, result = finished
    assert resume(result.folder, world=World.single("cpu")).summary == result.summary


def test_resuming_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="holds no run: there is no"):
        resume(tmp_path)


@pytest.mark.parametrize(
    "stop_at", [pytest.param(1, marks=pytest.mark.long), 5, 6, pytest.param(7, marks=pytest.mark.long), 13, 23]
)
def test_stop_and_resume_is_bitwise(finished, tmp_path, stop_at):
    """At any step: within the dense phase, at the conversion, after a cut, in another epoch."""
    recipe, whole = finished
    stopped = train(load_config(recipe), tmp_path / "run", world=World.single("cpu"), stop=stop_at_step(stop_at))
    assert stopped.summary is None
    torch.manual_seed(123)
    resumed = resume(tmp_path / "run", world=World.single("cpu"))
    assert resumed.summary["weights_sha256"] == whole.summary["weights_sha256"]
    assert resumed.summary["metric"] == whole.summary["metric"]
    assert resumed.summary["r"] == whole.summary["r"]
    assert _losses(resumed.folder) == _losses(whole.folder)
    assert _spectra(resumed.folder) == _spectra(whole.folder)


@pytest.mark.parametrize(
    "over",
    [
        pytest.param({"optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.01}}}, marks=pytest.mark.long),
        pytest.param({"optimizer": {"class_path": "SGD", "init_args": {"lr": 0.1}}}, marks=pytest.mark.long),
        {"train": {"accumulation": 2, "gradient_clip": 0.5, "precision": "bf16"}},
        pytest.param({"train": {"precision": "float64"}}, marks=pytest.mark.long),
        {"train": {"precision": "fp16", "activation_checkpointing": True}},
        {"oialr": {"stability_frequency": 2, "stability_threshold": 0.1, "delay": 4}},
        {"oialr": None},
    ],
    ids=["adamw", "sgd", "accumulated-bf16", "float64", "fp16-recomputed", "stability", "dense"],
)
def test_resume_is_bitwise_for(tmp_path, over):
    recipe = write_recipe(tmp_path, **merged({"train": {"steps": 16}}, over))
    world = World.single("cpu")
    whole = train(load_config(recipe), tmp_path / "whole", world=world)
    train(load_config(recipe), tmp_path / "run", world=world, stop=stop_at_step(9))
    resumed = resume(tmp_path / "run", world=world)
    assert resumed.summary["weights_sha256"] == whole.summary["weights_sha256"]
    assert _losses(resumed.folder) == _losses(whole.folder)


def test_delay_after_the_last_step_warns(tmp_path, caplog):
    recipe = write_recipe(tmp_path, oialr={"delay": 50}, train={"steps": 2})
    with caplog.at_level(logging.WARNING, "hpc_oialr"):
        result = train(load_config(recipe), tmp_path / "run", world=World.single("cpu"))
    assert "oialr.delay is 50 but the run has 2 steps: nothing will be converted" in caplog.text
    assert result.summary["r"] == {}


def test_early_stopping(tmp_path):
    recipe = write_recipe(
        tmp_path,
        optimizer={"init_args": {"lr": 0.0, "adamw_lr": 0.0}},
        train={"early_stopping": 2, "evaluations": 12},
    )
    result = train(load_config(recipe), tmp_path / "run", world=World.single("cpu"))
    assert result.summary["steps"] < 24


def _losses(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    return [(row["step"], row["loss"], row.get("metric")) for row in rows]


def _spectra(folder):
    layers = Spectra(folder)
    return {name: (layer.t.tolist(), str(layer.singular_values.tolist())) for name, layer in layers.items()}
