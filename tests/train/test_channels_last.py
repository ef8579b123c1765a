"""Images with their channels last: the format that convolutions compute in, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support.tiny_images import RECIPE, RESNET, require_channels_last
from support.tiny_runs import merged, write_recipe
from support.train_workers import losses, stop_at_step
from torch import nn

from hpc_oialr.distributed import World
from hpc_oialr.engines import SingleEngine
from hpc_oialr.errors import ConfigError
from hpc_oialr.plan.workload import Workload
from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.run import resume, train
from hpc_oialr.train.run_context import wants_channels_last
from hpc_oialr.train.tasks import cutmix, mixup

WORLD = World.single("cpu")
GPU = World(device=torch.device("cuda", 0))


def recipe(folder: Path, **over: Any) -> Path:
    path = folder / "images.yaml"
    tree = merged(merged(RECIPE, RESNET), {"train": {"precision": "float64"}})
    path.write_text(yaml.safe_dump(merged(tree, over)))
    return path


def test_a_run_is_the_same_but_for_rounding_and_resumes_bitwise(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    on = train(load_config(path), tmp_path / "on", world=WORLD)
    off = train(load_config(path, ["--train.channels_last", "off"]), tmp_path / "off", world=WORLD)
    train(load_config(path), tmp_path / "parts", world=WORLD, stop=stop_at_step(6))
    parts = resume(tmp_path / "parts", world=WORLD)
    assert on.summary is not None
    assert off.summary is not None
    assert parts.summary is not None
    assert losses(on.folder) == pytest.approx(losses(off.folder), rel=1e-9)
    assert on.summary["r"] == off.summary["r"] != {}
    assert parts.summary["weights_sha256"] == on.summary["weights_sha256"]


def test_formats(tmp_path: Path) -> None:
    """Of every convolution's result, dense, converted and cut; weights are stored as ever."""
    context = Workload.of(load_config(recipe(tmp_path)).config).run_context(SingleEngine(WORLD), batch=4)
    require_channels_last(context)


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_mixed_images_keep_the_format(mix: Any) -> None:
    pixels = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    assert mix(pixels, np.random.default_rng(0), 0.2)[0].is_contiguous(memory_format=torch.channels_last)


def test_it_is_refused_without_convolutions(tmp_path: Path) -> None:
    text = load_config(write_recipe(tmp_path, train={"channels_last": "on"}))
    with pytest.raises(ConfigError, match=r"train.channels_last is 'on'; is for images and 2-d convolutions, of which"):
        train(text, tmp_path / "run", world=WORLD)
    assert not (tmp_path / "run").exists()


def test_auto(tmp_path: Path) -> None:
    """On a GPU, for convolutional networks; the patches of a ViT are one convolution."""
    config = load_config(recipe(tmp_path, train={"channels_last": "auto"})).config
    images, text = {"pixel_values": torch.zeros(1, 3, 8, 8)}, {"input_ids": torch.zeros(1, 8, dtype=torch.int64)}
    convnet, vit = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), nn.Sequential(nn.Conv2d(3, 4, 3))
    assert wants_channels_last(config, convnet, images, GPU.device)
    assert not wants_channels_last(config, convnet, images, WORLD.device)
    assert not wants_channels_last(config, vit, images, GPU.device)
    assert not wants_channels_last(config, convnet, text, GPU.device)
    off = replace(config, train=replace(config.train, channels_last="off"))
    assert not wants_channels_last(off, convnet, images, GPU.device)
    on = replace(config, train=replace(config.train, channels_last="on"))
    assert wants_channels_last(on, vit, images, WORLD.device)
