from __future__ import annotations

import pytest
from support.tiny_runs import write_recipe

from hpc_oialr.plan.workload import Workload
from hpc_oialr.train.load_config import load_config


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    """A byte-level GPT-2 of width 16 and four layers that become low-rank."""
    # Few sets of r: a plan traces a step for each.
    return write_recipe(
        tmp_path_factory.mktemp("plan"),
        optimizer={"class_path": "AdamW", "init_args": {"lr": 0.01}},
        oialr={"limits": {"max_drop": 0.9}},
    )


@pytest.fixture(scope="session")
def workload(recipe):
    return Workload.of(load_config(recipe).config)
