"""Runs whose layers share a budget: kept to, by what layers do, the same on all ranks and after a resume."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.small_training import batch, settings, small_model, train
from support.spawn import spawn
from torch import Tensor
from torch.nn.functional import cross_entropy

from hpc_oialr import OIALR, Budget, LayerUpdate, OutputEnergy, RankLimits, RankRule, low_rank_layers, muon_adamw
from hpc_oialr.distributed import World
from hpc_oialr.engines import FSDPEngine
from hpc_oialr.lowrank.execution import dense_cost, factored_cost

LIMITS = RankLimits(max_drop=0.3, round_to=1)


def controller(rule: RankRule, dtype: torch.dtype = torch.float32, engine: Any = None, **options: Any) -> OIALR:
    model = small_model(dtype=dtype)
    if engine is not None:
        engine.place(model)
    config = settings(**{"rule": rule, "limits": LIMITS, "moments_steps": 3, **options})
    return OIALR(model, muon_adamw(model, lr=0.01), config, engine=engine)


@pytest.mark.parametrize("importance", ["weights", "inputs"])
def test_a_run_keeps_to_its_budget_of_operations(importance: str) -> None:
    oialr, seen = controller(Budget(operations=0.5), importance=importance), []
    for _ in range(30):
        train(oialr, oialr.optimizer, 1)
        layers = low_rank_layers(oialr.module).values()
        assert all(
            layer.tokens == (32 if oialr.t > 4 else 0) for layer in layers
        )  # none has seen any at the conversion
        done = sum(factored_cost(32, layer.m, layer.n, layer.r) for layer in layers)
        seen.append((done / sum(dense_cost(32, layer.m, layer.n) for layer in layers) if layers else 2.0, oialr.r))
    shares, rs = zip(*seen, strict=True)
    first = next(i for i, share in enumerate(shares) if share <= 0.5)
    # In steps of max_drop, at the updates 7, 10, ..., and no further.
    assert [share > 0.5 for share in shares] == [i < first for i in range(30)]
    assert first > 7
    assert all(r == rs[first] for r in rs[first:])


def test_what_layers_do_counts() -> None:
    def chosen(importance: str) -> dict[str, int]:
        oialr = controller(Budget(parameters=0.2), importance=importance)
        for t in range(20):
            x, y = batch(t)
            cross_entropy(oialr.model(x * torch.logspace(0, -3, 12)), y).backward()
            oialr.optimizer.step()
            oialr.optimizer.zero_grad()
            oialr.step()
        return oialr.r

    by_weights, by_inputs = chosen("weights"), chosen("inputs")
    assert by_inputs["0"] < by_weights["0"], "the first layer's inputs lie in few directions"
    assert by_inputs["2"] > by_weights["2"]


@pytest.mark.parametrize("importance", ["weights", "inputs", "inputs and gradients"])
def test_no_cut_takes_more_than_a_share_of_the_output(importance: str) -> None:
    def cuts(threshold: float) -> list[LayerUpdate]:
        rule = OutputEnergy(threshold)
        oialr, found = controller(rule, importance=importance, limits=RankLimits(max_drop=0.9, round_to=1)), []
        for t in range(20):
            x, y = batch(t)
            cross_entropy(oialr.model(x * torch.logspace(0, -2, 12)), y).backward()
            oialr.optimizer.step()
            oialr.optimizer.zero_grad()
            report = oialr.step()
            if report is not None and oialr.t > 4:
                found += report.layers
        return [cut for cut in found if cut.r < cut.r_before]

    for threshold in (0.9, 0.99):
        lost = [cut.cut_share for cut in cuts(threshold)]
        assert lost, "nothing was cut"
        if importance == "weights":
            assert lost == [None] * len(lost)
        else:
            assert 0 < max(map(float, lost)) < 1 - threshold + 1e-6
    few, many = ({cut.name: cut.r for cut in cuts(threshold)} for threshold in (0.9, 0.99))
    assert few["2"] < many["2"]


@pytest.mark.parametrize("at", [6, 7, 9])
def test_resumes_bitwise(at: int) -> None:
    oialr = controller(Budget(operations=0.5))
    train(oialr, oialr.optimizer, at)
    parts = oialr.state_dict(), oialr.tensor_state(), oialr.module.state_dict(), oialr.optimizer.state_dict()
    counters, tensors, values, moments = copy.deepcopy(parts)
    losses = train(oialr, oialr.optimizer, 10)
    again = controller(Budget(operations=0.5))
    again.load_state_dict(counters, tensors)
    again.module.load_state_dict(values)
    again.optimizer.load_state_dict(moments)
    assert train(again, again.optimizer, 10) == losses
    assert again.r == oialr.r


def _trained(rank: int, size: int, rule: RankRule, sharded: bool, uneven: bool) -> tuple[list[float], dict[str, int]]:
    torch.set_num_threads(1)
    world = World.from_environment(device="cpu") if size > 1 else World()
    oialr = controller(rule, torch.float64, FSDPEngine(world) if sharded else None)
    losses = []
    for t in range(16):
        x, y = batch(t, torch.float64)
        parts: list[tuple[Tensor, Tensor]] = list(zip(x.chunk(size), y.chunk(size), strict=True))
        x, y = parts[rank]
        if uneven and rank:  # ranks that would choose differently, one by one
            x, y = x[:2], y[:2]
        loss = cross_entropy(oialr.model(x), y)
        loss.backward()
        oialr.optimizer.step()
        oialr.optimizer.zero_grad()
        oialr.step()
        losses.append(float(world.all_reduce(loss.detach().clone())) / size)
    return losses, oialr.r


@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_choose_as_one_process_does(sharded: bool) -> None:
    rule = Budget(parameters=0.2)
    alone = _trained(0, 1, rule, False, False)
    for losses, r in spawn(_trained, 2, rule, sharded, False):
        assert losses == pytest.approx(alone[0], rel=1e-8)
        assert r == alone[1]


def test_ranks_that_see_other_numbers_of_tokens_choose_alike() -> None:
    (first, r), (second, other) = spawn(_trained, 2, Budget(operations=0.5), False, True)
    assert first == second
    assert r == other
