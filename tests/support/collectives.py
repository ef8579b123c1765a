"""Every kind of collective the package does, each over and over."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from support.crowd import Say

from hpc_oialr.engines import make_engine
from hpc_oialr.engines.fsdp import FSDPEngine
from hpc_oialr.linalg.tsqr import tsqr_svd
from hpc_oialr.processes import World, check_equal
from hpc_oialr.processes.metrics_channel import TorchChannel
from hpc_oialr.train.checkpoint_store import CheckpointStore

Round = Callable[[int], object]


def _all_reduce(world: World, _: Path) -> Round:
    return lambda i: world.all_reduce(torch.ones(1000))


def _started_all_reduce(world: World, _: Path) -> Round:
    def turn(i: int) -> None:
        pending = world.start_all_reduce(torch.ones(1000))
        assert pending is not None
        pending.wait()

    return turn


def _broadcast(world: World, _: Path) -> Round:
    def turn(i: int) -> None:
        pending = world.broadcast(torch.ones(1000), src=i % world.size)
        assert pending is not None
        pending.wait()

    return turn


def _share(world: World, _: Path) -> Round:
    return lambda i: world.share([torch.ones(100) for _ in range(5)], src=i % world.size)


def _gathered(world: World, _: Path) -> Round:
    return lambda i: world.all_gather_object({"rank": world.rank})


def _broadcast_object(world: World, _: Path) -> Round:
    return lambda i: world.broadcast_object({"round": i}, src=i % world.size)


def _barrier(world: World, _: Path) -> Round:
    return lambda i: world.barrier()


def _replicas(world: World, _: Path) -> Round:
    return lambda i: check_equal({"a": [torch.ones(100)]}, world)


def _metrics(world: World, _: Path) -> Round:
    channel = TorchChannel(world)
    return lambda i: channel.start(torch.ones(100, dtype=torch.float64)).result()


def _backward(world: World, _: Path) -> Round:
    model = make_engine(world).wrap(torch.nn.Linear(50, 50))
    return lambda i: model(torch.ones(2, 50)).sum().backward()


def _wrap(world: World, _: Path) -> Round:
    return lambda i: make_engine(world).wrap(torch.nn.Linear(50, 50))


def _sharded_step(world: World, _: Path) -> Round:
    engine, module = FSDPEngine(world), torch.nn.Linear(48, 48)
    engine.place(module)
    model = engine.wrap(module)
    return lambda i: model(torch.ones(2, 48)).sum().backward()


def _split_svd(world: World, _: Path) -> Round:
    rows = torch.randn(20, 10, generator=torch.Generator().manual_seed(world.rank))
    return lambda i: tsqr_svd(rows, world.group)


def _checkpoint(world: World, folder: Path) -> Round:
    store = CheckpointStore(folder, world, keep=1)
    return lambda i: store.save(i, {"a": torch.ones(1000), f"own.{world.rank}": torch.ones(10)}, {"step": i})


KINDS: dict[str, Callable[[World, Path], Round]] = {
    "all-reduce": _all_reduce,
    "started all-reduce": _started_all_reduce,
    "broadcast": _broadcast,
    "share": _share,
    "all-gather": _gathered,
    "broadcast of an object": _broadcast_object,
    "barrier": _barrier,
    "check of replicas": _replicas,
    "metrics channel": _metrics,
    "backward pass": _backward,
    "first wrapper": _wrap,
    "sharded step": _sharded_step,
    "SVD of row blocks": _split_svd,
    "checkpoint": _checkpoint,
}


def over_and_over(rank: int, size: int, say: Say, kind: str, folder: str, timeout_s: float) -> None:
    """Until another process dies; says so after the third time."""
    world = World.from_environment(device="cpu", timeout_s=timeout_s)
    with world.reported("the run's communication", only_communication=True):
        turn = KINDS[kind](world, Path(folder))
        for i in itertools.count():
            turn(i)
            if i == 2:
                say("under way")
