"""States of another structure for models whose matrices are split over processes: refused with the call to make."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from support.saved_runs import Run, X, Y, linear
from support.spawn import spawn
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard

from hpc_oialr import OIALR, low_rank_layers
from hpc_oialr.distributed import World
from hpc_oialr.engines import Engine, TensorEngine
from hpc_oialr.errors import ModelError

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
WHOLE = StateDictOptions(full_state_dict=True)


def live(engine: Engine | None, steps: int) -> tuple[OIALR, nn.Module]:
    """A model in training, under FSDP2 as its user has sharded it if there is no ``engine``."""
    torch.manual_seed(0)
    net = linear()
    if engine is None:
        fully_shard(net)
    else:
        engine.place(net)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    oialr = OIALR(net, optimizer, Run(linear, "SGD").oialr.config, engine=engine)
    for _ in range(steps):
        oialr.engine.backward(nn.functional.cross_entropy(oialr.model(X), Y), NO_SCALER)
        oialr.engine.update(optimizer, NO_SCALER, [], None)
        oialr.step()
    return oialr, net


def refused(load: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(ModelError) as error:
        load(*args, **options)
    return str(error.value)


def on_two(rank: int, size: int, states: dict[int, Any]) -> dict[str, list[str]]:
    world = World.from_environment(device="cpu", timeout_s=60)
    found: dict[str, list[str]] = {}
    engines: dict[str, Any] = {"FSDPEngine": None, "TensorEngine": TensorEngine(world, size=2)}
    for name, engine in engines.items():
        oialr, net = live(engine, 4)
        r = oialr.r
        assert type(oialr.engine).__name__ == name
        found[name] = [refused(net.load_state_dict, copy.deepcopy(states[t]), strict=False) for t in (1, 8)]
        assert oialr.r == r
        found[f"{name} writes"] = writes(net)
        if name == "FSDPEngine":
            same = get_model_state_dict(net, options=WHOLE)
            set_model_state_dict(net, same, options=WHOLE)
            found["whole"] = [
                refused(set_model_state_dict, net, copy.deepcopy(states[t]), options=WHOLE) for t in (1, 8)
            ]
            found["low-rank already"] = [refused(OIALR, copied(oialr), oialr.optimizer)]
        oialr.engine.end()
    return found


def copied(oialr: OIALR) -> nn.Module:
    oialr.detach()
    return oialr.module


@torch.no_grad()
def writes(net: nn.Module) -> list[str]:
    """In-place writes through a weight that is built from parts, and through its views."""
    layer = next(iter(low_rank_layers(net).values()))
    acts = [lambda w: w.mul_(2), lambda w: w[0].zero_(), lambda w: w.data.T.zero_(), nn.init.zeros_]
    if hasattr(layer.weight, "to_local"):
        acts.append(lambda w: w.to_local().zero_())
    return [refused(act, layer.weight) for act in acts]


def test_split_models_say_what_to_call() -> None:
    states = {t: Run(linear, "AdamW").train(t).state()["model"] for t in (1, 8)}
    for found in spawn(on_two, 2, states):
        for name, messages in found.items():
            if name.endswith("Engine"):
                expected = f"{name} cannot take on in a model that is in use: .* call oialr.load_state_dict, then load"
            elif name.endswith("writes"):
                expected = r"written in place, but it is built .* Clip, .* layer.S"
            elif name == "whole":
                expected = r"oialr.load_state_dict"
            else:
                expected = r"low-rank already, which FSDPEngine cannot take over.*then OIALR\(...\)"
            for message in messages:
                assert re.search(expected, message), (name, message)
