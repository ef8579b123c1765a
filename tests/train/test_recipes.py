"""The recipes' settings against what was published, and their models at full size, without memory."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_runs import write_recipe

from hpc_oialr import OIALRConfig
from hpc_oialr.errors import ConfigError
from hpc_oialr.lowrank import select
from hpc_oialr.method.rules import RelativeCutoff
from hpc_oialr.recipes import data_needed, recipes
from hpc_oialr.train.config import RunConfig
from hpc_oialr.train.load_config import dense_twin, load_config, paper_variant
from hpc_oialr.train.optimizers import AdamW
from hpc_oialr.train.schedules import StepDecay, WarmupCosine
from hpc_oialr.train.tasks import Forecasting

# Files of github.com/Helmholtz-AI-Energy/OIALR (arXiv 2401.08505), under configs/: training/oialr_trainer.yaml,
# experiment/imagenet-resnetrs.yaml, experiment/cifar10-minivit.yaml, and the constructor's defaults of
# src/madonna/models/oialr/model.py, with the horizons of analysis/af-192-mse.csv and af-720-mse.csv.
PUBLISHED: dict[str, dict[str, Any]] = {
    "vit_b16": {
        "frequency": 2000, "delay": 10_000, "beta": 0.2, "lr": 2e-4, "weight_decay": 0.01, "epochs": 90,
        "warmup_epochs": 17, "label_smoothing": 0.1, "clip": None, "keep_first": True, "batch": 1024,
    },
    "resnet_rs101": {
        "frequency": 100, "delay": 200, "beta": 0.15, "lr": 1e-3, "weight_decay": 1e-3, "epochs": 300,
        "warmup_epochs": 10, "label_smoothing": 0.1, "clip": 1.0, "keep_first": False, "batch": 1024,
    },
    "minivit_cifar10": {
        "frequency": 500, "delay": 2500, "beta": 0.15, "lr": 3e-4, "weight_decay": 0.01, "epochs": 300,
        "warmup_epochs": 10, "label_smoothing": 0.1, "clip": 5.0, "keep_first": False, "batch": 1024,
    },
    "autoformer_ettm2": {
        "frequency": 100, "delay": 1000, "beta": 0.1, "lr": 1e-4, "weight_decay": 0.0, "epochs": 10,
        "warmup_epochs": None, "label_smoothing": None, "clip": None, "keep_first": False, "batch": 32,
    },
}  # fmt: skip


FINE_TUNING = {"finetune_bert"}  # of pretrained models, without the method


def found(config: RunConfig) -> dict[str, Any]:
    """The same settings of a recipe."""
    oialr, optimizer, train = config.oialr, config.optimizer, config.train
    assert oialr is not None
    assert isinstance(oialr.rule, RelativeCutoff)
    assert isinstance(optimizer, AdamW)
    return {
        "frequency": oialr.frequency,
        "delay": oialr.delay,
        "beta": oialr.rule.beta,
        "lr": optimizer.lr,
        "weight_decay": optimizer.weight_decay,
        "epochs": train.epochs,
        "warmup_epochs": getattr(config.schedule, "warmup_epochs", None),
        "label_smoothing": getattr(config.task, "label_smoothing", None),
        "clip": train.gradient_clip,
        "keep_first": oialr.selection.keep_first,
        "batch": train.global_batch,
    }


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_settings_are_the_published_ones(name: str) -> None:
    config = paper_variant(load_config(name)).config
    assert found(config) == PUBLISHED[name]
    assert config.oialr is not None
    assert (config.oialr.limits.max_drop, config.oialr.limits.min_fraction) == (0.5, 0.01)
    assert (config.oialr.layer_share_step, config.oialr.selection.max_aspect) == (0.1, 10)
    assert (config.oialr.selection.keep_last, config.oialr.limits.at_conversion) == (True, 1.0)
    assert (config.oialr.carry_moments, config.oialr.core_lr_scale) == (False, 1.0)
    assert (config.oialr.importance, config.oialr.limits.round_to, config.oialr.train) == ("weights", 1, "cores")
    assert not config.oialr.bases_trained


@pytest.mark.parametrize("name", sorted(set(recipes()) - FINE_TUNING))
def test_every_recipe_has_a_dense_and_a_published_variant(name: str) -> None:
    loaded = load_config(name, ["--train.seed", "3"])
    paper, own = paper_variant(loaded), loaded.config.oialr
    assert own is not None
    chosen = "weights" if name == "fashion_mnist_vit" else "auto"  # the demo's settings were chosen so
    assert own.importance == chosen
    assert paper.config.oialr is not None
    kept = {field: getattr(paper.config.oialr, field) for field in ("delay", "frequency", "selection", "rule")}
    assert paper.config.oialr == OIALRConfig.paper(**kept)
    assert isinstance(paper.config.optimizer, AdamW)
    assert type(paper.config.oialr.rule) is RelativeCutoff
    assert (paper.config.train.seed, paper.config.train.epochs) == (3, loaded.config.train.epochs)
    for each in (loaded, paper):
        assert dense_twin(each, own=True).config.oialr is None
    same = dataclasses.replace(dense_twin(paper, own=True).config, oialr=paper.config.oialr)
    assert same == paper.config, "the published settings without the method"


def test_the_command_line_goes_over_the_published_settings() -> None:
    words = ["--oialr.delay", "7", "--optimizer.lr", "0.5", "--paper.train.epochs", "2"]
    paper = paper_variant(load_config("vit_b16", words))
    assert paper.config.oialr is not None
    assert (paper.config.oialr.delay, paper.config.oialr.frequency) == (7, 2000)
    assert (paper.config.optimizer.lr, paper.config.train.epochs) == (0.5, 2)  # type: ignore[attr-defined]
    assert load_config("vit_b16", words).config.train.epochs == 90


def test_a_recipe_without_published_settings(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    with pytest.raises(ConfigError, match=r"optimizer is 'MuonAdamW'.*--paper.optimizer AdamW"):
        paper_variant(load_config(recipe))
    paper = paper_variant(load_config(recipe, ["--paper.optimizer", "AdamW"])).config
    assert paper.oialr == OIALRConfig.paper(delay=6, frequency=4)
    with pytest.raises(ConfigError, match="oialr is None; trains dense"):
        paper_variant(load_config(recipe, ["--oialr", "null"]))
    with pytest.raises(ConfigError, match="paper.dense is .* the published variant has none"):
        load_config(recipe, ["--paper.dense.train.steps", "3"])


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_dense_twin_differs_by_the_method_alone(name: str) -> None:
    config = load_config(name).config
    twin = dense_twin(load_config(name), own=True).config
    assert twin.oialr is None
    assert dataclasses.replace(twin, oialr=config.oialr, dense=config.dense, paper=config.paper) == config


def test_schedules() -> None:
    cosine = paper_variant(load_config("minivit_cifar10")).config.schedule
    assert isinstance(cosine, WarmupCosine)
    assert (cosine.k_decay, cosine.final * 3e-4) == (0.34, pytest.approx(1e-5, rel=0.02))
    residual = load_config("resnet_rs101").config.schedule
    assert isinstance(residual, WarmupCosine)
    assert (residual.k_decay, residual.final * 1e-3) == (0.34, 1e-5)
    assert load_config("autoformer_ettm2").config.schedule == StepDecay(decay=0.5, epochs=1)


def test_image_settings() -> None:
    config = load_config("resnet_rs101").config
    assert (config.data.size, config.data.evaluation_size) == (160, 224)  # type: ignore[attr-defined]
    assert (config.task.mixup, config.task.cutmix) == (0.1, 1.0)  # type: ignore[attr-defined]
    assert config.train.sync_batch_norm
    assert config.model.dropout == 0.25  # type: ignore[attr-defined]
    small = load_config("minivit_cifar10").config.data
    assert (small.augment.flip, small.augment.padding) == (True, 4)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "shape", "parameters", "layers"),
    [
        ("vit_b16", (3, 224, 224), 86_567_656, 6 * 12),
        ("resnet_rs101", (3, 160, 160), 44_549_160, 1 + 3 * 33 + 4),
        ("minivit_cifar10", (3, 32, 32), 42_698_506, 1 + 6 * 6),
    ],
)
def test_models_of_images(
    name: str, shape: tuple[int, ...], parameters: int, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    plain = ["--model.library", "transformers"] if name == "resnet_rs101" else []
    config = load_config(name, plain).config
    with torch.device("meta"):
        model = config.model.build({"pixel_values": torch.empty(2, *shape), "labels": torch.empty(2)})
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert config.oialr is not None
    assert len(select(model, config.oialr.selection)) == layers


@pytest.mark.parametrize("horizon", [96, 192, 336, 720])
@pytest.mark.parametrize("dataset", ["etth1", "etth2", "ettm1", "ettm2"])
def test_autoformer(dataset: str, horizon: int) -> None:
    config = load_config(f"autoformer_{dataset}", ["--data.horizon", str(horizon)]).config
    data: Any = config.data
    hourly = dataset.startswith("etth")
    assert (data.dataset, data.input_size, data.past_length) == (dataset, 7, 96)
    assert data.split_steps == ((8_640, 2_880, 2_880) if hourly else (34_560, 11_520, 11_520))
    assert config.task == Forecasting(objective="mse")
    assert config.oialr is not None
    times = (config.oialr.delay, config.oialr.frequency)
    assert times == ((0.1, 0.01) if hourly else (1000, 100))
    past, features = data.past_length, data.num_time_features
    example = {
        "past_values": torch.empty(2, past, 7),
        "past_time_features": torch.empty(2, past, features),
        "future_values": torch.empty(2, horizon, 7),
    }
    with torch.device("meta"):
        model: Any = config.model.build(example)
    assert (model.config.prediction_length, model.config.context_length) == (horizon, 96)
    assert (model.config.input_size, model.config.d_model, model.config.encoder_layers) == (7, 512, 2)
    assert (model.config.lags_sequence, model.config.scaling) == ([0], False)


def test_each_says_what_it_is_and_which_data_it_needs() -> None:
    for name, description in recipes().items():
        assert len(description) < 100
        assert data_needed(name).startswith(("oialr data fetch ", "--data.path "))
