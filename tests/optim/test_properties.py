"""Any supported optimizer and wrapper, any schedule: stopping, loading and copying at any time change no bit.

For many more plans than these: ``OIALR_CASES=500 pytest tests/optim/test_properties.py``.
"""

from __future__ import annotations

import copy

import pytest
from support.cases import seeds
from support.random_run import RandomRun, differences, drawn
from support.spawn import spawn
from torch import nn

from hpc_oialr.distributed import World
from hpc_oialr.errors import ModelError


def failures(plans: range, processes: int) -> list[str]:
    found = []
    for seed in plans:
        plan = drawn(seed, processes)
        try:
            differ = differences(plan)
        except Exception as error:
            raise AssertionError(f"{plan}") from error
        if differ:
            found.append(f"{plan}: {differ}")
    return found


def test_on_one_process() -> None:
    assert not failures(seeds(16), 1)


def on_two(rank: int, size: int, plans: range) -> list[str]:
    World.from_environment(device="cpu", timeout_s=60)
    found = failures(plans, size)
    run = RandomRun(drawn(0, size))
    with pytest.raises(ModelError, match="a controller of 2 processes cannot be copied or pickled"):
        copy.deepcopy(run)
    return found


def test_on_two_processes() -> None:
    assert spawn(on_two, 2, seeds(8)) == [[], []]


def test_modules_are_not_shared_between_runs() -> None:
    first, second = (RandomRun(drawn(0)).oialr.module for _ in range(2))
    assert isinstance(first, nn.Module)
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
