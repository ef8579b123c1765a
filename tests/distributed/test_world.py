"""The World with one process, with several, and with a dead one."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.crowd import Crowd, Say
from support.spawn import free_port, launch_environment, spawn

from hpc_oialr.distributed import World
from hpc_oialr.errors import WorldError


def test_one_process_talks_to_nobody() -> None:
    world = World.from_environment(device="cpu", environ={})
    tensor = torch.arange(3.0)
    assert world == World(device=torch.device("cpu"))
    assert world.is_main
    assert world.broadcast(tensor, src=0) is None
    assert world.all_reduce(tensor, op="max") is tensor
    assert world.all_gather_object("a") == ["a"]
    assert world.broadcast_object("a") == "a"
    assert (world.any(True), world.any(False)) == (True, False)
    world.barrier()
    world.close()
    assert not dist.is_initialized()
    assert World.single("cpu") == world
    assert World.current().size == 1


def talk(rank: int, size: int) -> dict[str, object]:
    world = World.from_environment(timeout_s=60)
    sent = torch.full((2,), float(rank))
    work = world.broadcast(sent, src=1)
    assert work is not None
    work.wait()
    result = {
        "me": (world.rank, world.size, world.local_rank, world.local_size, world.launcher, world.is_main),
        "sent": sent.tolist(),
        "sum": world.all_reduce(torch.tensor(rank + 1)).item(),
        "max": world.all_reduce(torch.tensor(float(rank)), op="max").item(),
        "min": world.all_reduce(torch.tensor(float(rank)), op="min").item(),
        "gathered": world.all_gather_object({"rank": rank}),
        "object": world.broadcast_object(f"from {rank}", src=1),
        "any": (world.any(rank == 1), world.any(False)),
    }
    adopted = World.current()
    result["adopted"] = (adopted.rank, adopted.size, adopted.local_rank, adopted.local_size, adopted.launcher)
    adopted.close()
    assert dist.is_initialized()
    world.barrier()
    world.close()
    world.close()
    assert not dist.is_initialized()
    return result


def test_two_processes() -> None:
    first, second = spawn(talk, 2)
    assert first.pop("me") == (0, 2, 0, 2, "torchrun", True)
    assert second.pop("me") == (1, 2, 1, 2, "torchrun", False)
    assert first.pop("adopted") == (0, 2, 0, 2, "adopted")
    assert second.pop("adopted") == (1, 2, 1, 2, "adopted")
    assert first == second
    assert first == {
        "sent": [1.0, 1.0],
        "sum": 3,
        "max": 1.0,
        "min": 0.0,
        "gathered": [{"rank": 0}, {"rank": 1}],
        "object": "from 1",
        "any": (True, False),
    }


def subgroup(rank: int, size: int) -> tuple[int, int, float]:
    World.from_environment(timeout_s=60)
    groups = [dist.new_group([0]), dist.new_group([2, 1])]
    if rank == 0:
        world = World.current(groups[0])
        return world.rank, world.size, world.all_reduce(torch.tensor(5.0)).item()
    world = World.current(groups[1])
    value = torch.tensor(float(rank))
    work = world.broadcast(value, src=1)
    assert work is not None
    work.wait()
    return world.rank, world.size, value.item()


def test_a_group_counts_its_own_processes() -> None:
    alone, *pair = spawn(subgroup, 3)
    assert alone == (0, 1, 5.0)
    ranks = [rank for rank, _, _ in pair]
    assert sorted(ranks) == [0, 1]
    assert {value for _, _, value in pair} == {float(1 + ranks.index(1))}


def test_a_process_that_never_comes_is_an_error() -> None:
    environ = launch_environment(0, 2, free_port())
    with pytest.raises(WorldError, match=r"rank 0 of 2 .* could not meet the others.*within 2 s"):
        World.from_environment(device="cpu", timeout_s=2, environ=environ)


def _die(rank: int, size: int, say: Say) -> None:
    world = World.from_environment(device="cpu", timeout_s=5)
    world.barrier()
    if rank == 1:
        os._exit(9)
    try:
        world.all_reduce(torch.ones(1000))
    except WorldError as error:
        say(str(error))


def test_a_process_that_dies_leaves_the_others_an_error() -> None:
    with Crowd(_die, 2) as crowd:
        assert crowd.end(1) == (9, None)
        _, message = crowd.end(0)
    assert "rank 0 of 2: an all-reduce failed; every rank must take part within the timeout" in message
    assert "resume from the last checkpoint" in message


def _hang(rank: int, size: int, noticed: Path) -> None:
    world = World.from_environment(timeout_s=2)
    world.barrier()
    if rank == 1:
        # Hangs until the other one has given up on it, which it would never do without a timeout.
        while not noticed.exists():
            time.sleep(0.1)
        return
    with pytest.raises(WorldError, match="an all-reduce failed"):
        world.all_reduce(torch.ones(10))
    noticed.touch()


def test_a_process_that_hangs_is_an_error_after_the_timeout(tmp_path: Path) -> None:
    spawn(_hang, 2, tmp_path / "noticed")
    assert (tmp_path / "noticed").exists()


def again_and_again(rank: int, size: int) -> list[float]:
    """Three groups one after another; something still refers to each one's store."""
    held, sums = [], []
    for _ in range(3):
        world = World.from_environment(timeout_s=30)
        held.append((dist.new_group(), world.group))
        sums.append(float(world.all_reduce(torch.ones(1))))
        world.close()
    return sums


def test_the_same_processes_meet_again():
    assert spawn(again_and_again, 2) == [[2.0, 2.0, 2.0]] * 2
