"""Many changes of r leave nothing behind where parameters are DTensors; of DeepSpeed see test_deepspeed."""

from __future__ import annotations

import gc

import pytest
import torch
from support.spawn import spawn
from torch import nn

from hpc_oialr import OIALR, FixedFraction, OIALRConfig, RankLimits
from hpc_oialr.distributed import World
from hpc_oialr.engines import Engine, FSDPEngine, TensorEngine

OFF = torch.amp.GradScaler("cpu", enabled=False)


def objects(engine: Engine, after: tuple[int, int]) -> list[int]:
    """Python's objects after so many updates, each of which cuts r of two layers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    engine.place(net)
    optimizer = torch.optim.AdamW(net.parameters())
    limits = RankLimits(max_drop=0.06, round_to=1)
    config = OIALRConfig(delay=1, frequency=1, rule=FixedFraction(0.1), limits=limits, layer_share_step=1.0)
    oialr, found, before = OIALR(net, optimizer, config, engine=engine), [], 33
    for update in range(max(after) + 1):
        engine.backward(oialr.model(torch.ones(4, 32)).square().mean(), OFF)
        engine.update(optimizer, OFF, [p for p in net.parameters() if p.requires_grad], None)
        oialr.step()
        r = max(oialr.r.values())
        assert r < before or update == 0, "every update cuts"
        before = r
        if update in after:
            gc.collect()
            found.append(len(gc.get_objects()))
    return found


def on_two(rank: int, size: int) -> dict[str, list[int]]:
    world = World.from_environment(device="cpu", timeout_s=60)
    engines = {"FSDP": FSDPEngine(world), "TensorParallel": TensorEngine(world, size=2)}
    return {name: objects(engine, (4, 12)) for name, engine in engines.items()}


@pytest.fixture(scope="module")
def found() -> list[dict[str, list[int]]]:
    return spawn(on_two, 2)


@pytest.mark.parametrize("name", ["FSDP", "TensorParallel"])
def test_no_object_stays_for_a_shape_that_is_gone(found: list[dict[str, list[int]]], name: str) -> None:
    for of_process in found:
        early, late = of_process[name]
        assert late - early < 50
