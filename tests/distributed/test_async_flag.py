"""One process wants to stop: all know it at the same step."""

from __future__ import annotations

import torch
from support.spawn import spawn

from hpc_oialr.distributed import World
from hpc_oialr.distributed.world import AsyncFlagReduce


def ask(rank: int, size: int) -> tuple[list[bool], bool, str]:
    world = World.from_environment(device="cpu", timeout_s=60)
    flag = AsyncFlagReduce(world)
    answers = []
    for step in range(1, 7):
        answers.append(flag.exchange(rank == 1 and step == 3))
        # A step's own sums, under way at the same time.
        world.all_reduce(torch.ones(1000))
    return answers, flag.settle(), str(flag._device)


def test_all_agree_a_step_later():
    expected = ([False, False, False, True, False, False], False, "cpu")
    assert spawn(ask, 2) == [expected, expected]


def test_one_process_agrees_with_itself_at_once():
    flag = AsyncFlagReduce(World.single("cpu"))
    assert [flag.exchange(word) for word in (False, True, False)] == [False, True, False]
    assert flag.settle() is False
