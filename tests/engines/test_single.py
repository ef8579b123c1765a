"""One process: the module is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hpc_oialr.distributed import World
from hpc_oialr.engines import DDPEngine, SingleEngine, adopt, make_engine
from hpc_oialr.errors import ModelError


def test_nothing_is_wrapped() -> None:
    engine, module = make_engine(World.single("cpu")), nn.Linear(2, 2)
    assert isinstance(engine, SingleEngine)
    assert engine.wrap(module) is module
    assert engine.rewrap(module) is module
    with engine.no_sync(module):
        module(torch.ones(1, 2)).sum().backward()
    assert module.weight.grad is not None


def test_several_processes_get_ddp_with_its_options() -> None:
    engine = make_engine(World(0, 2), find_unused_parameters=True)
    assert isinstance(engine, DDPEngine)
    assert engine.world.size == 2


def test_a_plain_model_without_a_group_is_one_process() -> None:
    module = nn.Linear(2, 2)
    engine, inner = adopt(module)
    assert isinstance(engine, SingleEngine)
    assert inner is module


def test_other_wrappers_are_refused() -> None:
    with pytest.raises(ModelError, match=r"wrapped in DataParallel; must be plain, in Distributed"):
        adopt(nn.DataParallel(nn.Linear(2, 2)))
