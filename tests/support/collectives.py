"""Every kind of collective the package does, each over and over."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from support.crowd import Say

from hpc_oialr import OIALR, FixedFraction, OIALRConfig, RankLimits
from hpc_oialr.distributed import World, check_equal
from hpc_oialr.distributed.metric_reduction import MetricsChannel
from hpc_oialr.engines import DeepSpeedEngine, Engine, FSDPEngine, TensorEngine, make_engine
from hpc_oialr.engines.deepspeed import import_deepspeed
from hpc_oialr.linalg.tsqr import tsqr_svd
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
    channel = MetricsChannel(world)
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


def _split_step(world: World, _: Path) -> Round:
    """Under tensor parallelism, with an update in every step: cores, bases and moments too."""
    return _trained(TensorEngine(world, size=world.size))


def _sharded_update(world: World, _: Path) -> Round:
    return _trained(FSDPEngine(world))


def _zero_step(world: World, _: Path) -> Round:
    return _trained(DeepSpeedEngine(world, {"zero_optimization": {"stage": 3}}))


def _trained(engine: Engine) -> Round:
    """Steps in which the method updates its layers, none of which is cut."""
    module = torch.nn.Sequential(torch.nn.Linear(24, 48), torch.nn.GELU(), torch.nn.Linear(48, 24))
    engine.place(module)
    optimizer, off = torch.optim.AdamW(module.parameters()), torch.amp.GradScaler("cpu", enabled=False)
    limits = RankLimits(at_conversion=0.5)
    config = OIALRConfig(delay=1, frequency=1, rule=FixedFraction(0.5), limits=limits, layer_share_step=1.0)
    oialr = OIALR(module, optimizer, config, engine=engine)

    def turn(i: int) -> None:
        engine.backward(oialr.model(torch.ones(4, 24)).square().mean(), off)
        engine.update(optimizer, off, list(module.parameters()), None)
        oialr.step()

    return turn


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
    "sharded update": _sharded_update,
    "split step": _split_step,
    "SVD of row blocks": _split_svd,
    "checkpoint": _checkpoint,
}


# The library of this one takes seconds to import.
ZERO_STEP = "ZeRO step"


def over_and_over(rank: int, size: int, say: Say, kind: str, folder: str, timeout_s: float) -> None:
    """Until another process dies; says so after the third time."""
    if kind == ZERO_STEP:
        _import_together(size, Path(folder))
    world = World.from_environment(device="cpu", timeout_s=timeout_s)
    with world.reported("the run's communication", only_communication=True):
        turn = (KINDS | {ZERO_STEP: _zero_step})[kind](world, Path(folder))
        for i in itertools.count():
            turn(i)
            if i == 2:
                say("under way")


def _import_together(size: int, folder: Path) -> None:
    """So that none waits for the others' import in the first collective."""
    import_deepspeed(World(size=size))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{os.getpid()}.here").touch()
    while len(list(folder.glob("*.here"))) < size:
        time.sleep(0.05)
