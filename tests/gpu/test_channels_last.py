"""Convolutions compute with channels last on a GPU by themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from support.tiny_images import RECIPE, RESNET, require_channels_last
from support.tiny_runs import merged

from hpc_oialr.distributed import World
from hpc_oialr.engines import SingleEngine
from hpc_oialr.plan.workload import Workload
from hpc_oialr.train.load_config import load_config

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-params"])
def test_auto(precision: str, tmp_path: Path, device: torch.device) -> None:
    wanted = "auto" if device.type == "cuda" else "on"
    path, train = tmp_path / "images.yaml", {"channels_last": wanted, "precision": precision, "device": device.type}
    path.write_text(yaml.safe_dump(merged(merged(RECIPE, RESNET), {"train": train})))
    context = Workload.of(load_config(path).config).run_context(SingleEngine(World.single(device)), batch=4)
    assert context.channels_last
    require_channels_last(context)
