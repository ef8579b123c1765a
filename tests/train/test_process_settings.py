"""A run leaves the process as it found it."""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import suppress

import torch
from support.tiny_runs import write_recipe

from hpc_oialr.distributed import World
from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.process_settings import process_settings
from hpc_oialr.train.run import train


def _settings() -> dict[str, object]:
    return {
        "deterministic": torch.get_deterministic_debug_mode(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "threads": torch.get_num_threads(),
        "recompile_limit": torch._dynamo.config.recompile_limit,
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "levels": [logging.getLogger(name).level for name in ("hpc_oialr", "DeepSpeed", "")],
        "handlers": list(logging.getLogger("hpc_oialr").handlers),
    }


def test_a_run_takes_its_settings_back(tmp_path):
    before = _settings()
    recipe = write_recipe(tmp_path, train={"steps": 3})
    train(load_config(recipe), tmp_path / "run", world=World.single("cpu"))
    assert _settings() == before


def test_what_a_library_changed_meanwhile_too():
    before = _settings()
    with suppress(ZeroDivisionError), process_settings(World.single("cpu"), compiled=True):
        assert torch.get_deterministic_debug_mode() == 1
        assert torch._dynamo.config.recompile_limit == 64
        os.environ["OIALR_TEST"] = "1"
        os.environ.pop("PATH")
        warnings.filterwarnings("ignore", message="anything")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        raise ZeroDivisionError
    assert _settings() == before
