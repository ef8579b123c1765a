"""One low-rank run of images and its dense twin, for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support.one_thread import one_thread as one_thread
from support.tiny_images import RECIPE

from hpc_oialr.distributed import World
from hpc_oialr.train.load_config import dense_twin, load_config
from hpc_oialr.train.run import train


@pytest.fixture(scope="package")
def compared(tmp_path_factory) -> Path:
    """The runs ``dense`` and ``oialr`` in one folder; only read it."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = folder / "images.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    loaded = load_config(recipe)
    for side, settings in (("dense", dense_twin(loaded, own=True)), ("oialr", loaded)):
        train(settings, folder / side, world=World.single("cpu"))
    return folder
