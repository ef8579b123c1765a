"""State dicts of another structure: the loaded model is the saved one, and training goes on with it, or it is refused."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from support.saved_runs import OPTIMIZERS, Run, X, Y, attention, groups, in_step, linear, separate
from support.spawn import spawn
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from hpc_oialr import OIALR, FixedFraction, OIALRConfig, RankLimits, low_rank_layers, merge
from hpc_oialr.distributed import World
from hpc_oialr.errors import ModelError

# Phases of a run: dense; converted at r = k; after one and two cuts.
PHASES = (1, 4, 6, 8)


@pytest.mark.parametrize(("make", "name"), [(attention, "AdamW"), (separate, "MuonAdamW")])
def test_a_model_of_any_phase_loads_into_one_of_any_other(make: Any, name: str) -> None:
    saved = {}
    for phase in PHASES:
        run = Run(make, name).train(phase)
        saved[phase] = (run.state(), run.output(), run.oialr.r, groups(run))
    for here, there in ((1, 4), (4, 8), (8, 6), (6, 1), (1, 8), (8, 1)):
        run = Run(make, name).train(here)
        state, output, r, order = saved[there]
        run.load(state, ("model",), strict=here % 4 == 0)
        assert torch.equal(run.output(), output), (here, there)
        assert run.oialr.r == r
        assert groups(run) == order
        in_step(run)
        before = {n: layer.S.detach().clone() for n, layer in low_rank_layers(run.model).items()}
        run.train(1)
        layers = low_rank_layers(run.model)
        assert all(not torch.equal(S, layers[n].S) for n, S in before.items() if layers[n].S.shape == S.shape)
        run.train(3)
        in_step(run)
        assert torch.isfinite(run.output()).all()


@pytest.mark.parametrize("name", ["SGD", "MuonAdamW"])
def test_every_order_with_the_structure_before_the_optimizer_is_the_same_run(name: str) -> None:
    for phase in (1, 6):
        first = Run(linear, name).train(phase)
        state = first.state()
        first.train(3)
        for order in itertools.permutations(("model", "oialr", "optimizer")):
            for here in (0, 5):
                second = Run(linear, name).train(here)
                if order[0] == "optimizer" and (phase < 3) != (here < 3):
                    with pytest.raises(ModelError, match="oialr.load_state_dict\\) first, then the optimizer's"):
                        second.load(state, order)
                    continue
                if order[0] == "optimizer" and phase >= 3:
                    continue
                second.load(state, order).train(3)
                assert torch.equal(first.output(), second.output()), (phase, order, here)
                assert second.oialr.r == first.oialr.r


@settings(max_examples=8, deadline=None)
@given(
    name=st.sampled_from(sorted(OPTIMIZERS)),
    pieces=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    orders=st.lists(
        st.sampled_from(
            [
                ("model", "optimizer", "oialr"),
                ("oialr", "model", "optimizer"),
                ("oialr", "optimizer", "model"),
            ]
        ),
        min_size=4,
        max_size=4,
    ),
    warm=st.integers(0, 7),
)
def test_saves_and_loads_at_any_time_change_nothing(name: str, pieces: list[int], orders: Any, warm: int) -> None:
    """Into models that are fresh, or have trained on by themselves."""
    whole = Run(linear, name).train(sum(pieces) + 1)
    run = Run(linear, name)
    for steps, order in zip(pieces, orders, strict=False):
        state = run.train(steps).state()
        usable = ("model", "optimizer", "oialr") if warm else order
        run = Run(linear, name).train(warm).load(state, usable)
    run.train(1)
    assert torch.equal(run.output(), whole.output())
    assert groups(run) == groups(whole)


def test_moments_go_over_to_the_bases_that_are_loaded() -> None:
    """As if the dense weight had been loaded under an optimizer that keeps its momentum."""
    run, other = Run(linear, "SGD").train(6), Run(linear, "SGD").train(4)
    layer = low_rank_layers(run.model)["1"]
    momentum = run.optimizer.state[layer.S]["momentum_buffer"]
    lifted = layer.U @ momentum @ layer.Vh
    run.load(other.state(), ("model",))
    layer = low_rank_layers(run.model)["1"]
    got = run.optimizer.state[layer.S]["momentum_buffer"]
    torch.testing.assert_close(got, layer.U.mT @ lifted @ layer.Vh.mT)
    lifted = layer.U @ got @ layer.Vh
    run.load(Run(linear, "SGD").train(1).state(), ("model",))
    torch.testing.assert_close(run.optimizer.state[run.model[1].weight]["momentum_buffer"], lifted.detach())


def test_averages_follow_a_load() -> None:
    run = Run(attention, "SGD")
    average = AveragedModel(run.model)
    limits = RankLimits(max_drop=0.3, round_to=1)
    run.oialr.detach()
    config = OIALRConfig(delay=3, frequency=2, rule=FixedFraction(0.3), layer_share_step=1.0, limits=limits)
    run.oialr = OIALR(run.model, run.optimizer, config, averages=[average])
    run.train(4)
    early = Run(attention, "SGD").train(1)
    late = Run(attention, "SGD").train(8)
    for other in (late, early, late):
        run.load(other.state(), ("model",))
        assert {n: layer.r for n, layer in low_rank_layers(average.module).items()} == run.oialr.r
        average.update_parameters(run.model)
        assert torch.isfinite(average(X)).all()
        assert not any(p.requires_grad for n, p in average.named_parameters() if n.endswith(".S"))


@pytest.mark.parametrize("order", [("oialr", "model", "average"), ("model", "average", "oialr"), ("average", "model")])
def test_an_average_is_loaded_after_its_model(order: tuple[str, ...]) -> None:
    """Its cores are in the model's bases; a state of others would be averaged with them."""
    runs = []
    for _ in range(2):
        run = Run(attention, "SGD")
        run.oialr.detach()
        average = AveragedModel(run.model)
        run.oialr = OIALR(run.model, run.optimizer, run.oialr.config, averages=[average])
        runs.append((run, average))
    (first, average), (second, other) = runs
    for _ in range(8):
        first.train(1)
        average.update_parameters(first.model)
    stored = copy.deepcopy(first.state() | {"average": average.state_dict()})
    if order[0] == "average":
        for phase in (1, 4):
            second.train(phase)
            with pytest.raises(ModelError, match="running average holds layer .* Load the model's state"):
                other.load_state_dict(stored["average"], strict=False)
        second.oialr.detach()
        other.load_state_dict(stored["average"])
        assert torch.equal(other(X), average(X))
        return
    second.train(6)
    for name in order:
        if name == "average":
            other.load_state_dict(stored["average"])
        else:
            second.load(stored, (name,))
    second.optimizer.load_state_dict(stored["optimizer"])
    for run, mean in ((first, average), (second, other)):
        for _ in range(4):
            run.train(1)
            mean.update_parameters(run.model)
    assert torch.equal(average(X), other(X))
    assert torch.equal(first.output(), second.output())


def test_parts_of_a_model_load_too() -> None:
    first, second = Run(attention, "AdamW").train(8), Run(attention, "AdamW").train(1)
    for name in ("inner", "attention", "conv"):
        part = second.model.get_submodule(name)
        assert not any(part.load_state_dict(first.model.get_submodule(name).state_dict(), strict=False))
    second.model.last.load_state_dict(first.model.last.state_dict())
    assert torch.equal(first.output(), second.output())
    assert first.oialr.r == second.oialr.r
    in_step(second)


def test_layers_without_a_controller_take_the_stored_form() -> None:
    dense, cut, more = (Run(linear, "SGD").train(phase) for phase in (1, 6, 8))
    free = copy.deepcopy(more.model)
    for run in (cut, dense):
        free.load_state_dict(run.model.state_dict(), strict=False)
        assert torch.equal(free(X), run.model(X))
    assert isinstance(free[1], nn.Linear)
    assert type(free[1]) is nn.Linear


def test_an_optimizer_that_nobody_takes_along_is_named() -> None:
    run, states = Run(linear, "SGD").train(8), [Run(linear, "SGD").train(phase).state() for phase in (6, 1)]
    run.oialr.detach()
    for state in states:
        with pytest.warns(UserWarning, match="takes the form .* Make the optimizer from model.parameters"):
            run.load(state, ("model",))
        run.optimizer = torch.optim.SGD(run.model.parameters(), 0.1)


def test_what_cannot_be_loaded_is_refused_with_the_call_to_make() -> None:
    saved = Run(linear, "AdamW").train(6)
    state = saved.state()
    run = Run(linear, "AdamW")
    with pytest.raises(ModelError, match=r"assign=True\) replaces every parameter"):
        run.model.load_state_dict(copy.deepcopy(state["model"]), assign=True)
    with pytest.raises(ModelError, match="holds layer 1 twice: 1.weight and 1.S"):
        run.model.load_state_dict(state["model"] | {"1.weight": torch.zeros(24, 32)}, strict=False)
    with pytest.raises(ModelError, match="layer 1 is 20 x 32 .* here it is 24 x 32. It belongs to another model"):
        run.model.load_state_dict(state["model"] | {"1.U": torch.zeros(20, saved.oialr.r["1"])}, strict=False)
    assert run.oialr.r == {}
    run.load(state, ("oialr",))
    with pytest.raises(ModelError, match=r"layer 1 has no values: .*model.load_state_dict\(...\)"):
        run.model(X)
    run.load(state, ("model", "optimizer"))
    assert torch.equal(run.output(), saved.output())
    with pytest.raises(ModelError, match=r"groups hold .2, 0, 1, 3. parameters, those of the state .0, 2, 1, 3."):
        Run(linear, "MuonAdamW").load(Run(linear, "MuonAdamW").train(6).state(), ("optimizer",))
    late = Run(linear, "AdamW").load(Run(linear, "AdamW").train(1).state(), ("optimizer",))
    with pytest.raises(ModelError, match="layer 1 changes its structure after the optimizer's state was loaded"):
        late.load(state, ("model",))


@pytest.mark.parametrize("name", ["AdamW", "MuonAdamW"])
def test_torchs_distributed_checkpoint_calls(name: str) -> None:
    """``set_state_dict`` where the structure is the same; otherwise it says how."""
    first = Run(linear, name).train(6)
    model, optimizer = copy.deepcopy(get_state_dict(first.model, first.optimizer))
    oialr = copy.deepcopy((first.oialr.state_dict(), first.oialr.tensor_state()))
    first.train(5)
    at_once = Run(linear, name).train(4)
    with pytest.raises(ModelError, match="load the model's state .* first, then the optimizer's"):
        set_state_dict(
            at_once.model,
            at_once.optimizer,
            model_state_dict=copy.deepcopy(model),
            optim_state_dict=copy.deepcopy(optimizer),
        )
    with pytest.raises(RuntimeError, match=r"1\.(weight|S)"):
        set_state_dict(
            (dense := Run(linear, name)).model,
            dense.optimizer,
            model_state_dict=copy.deepcopy(model),
            optim_state_dict=copy.deepcopy(optimizer),
        )
    for structure_first in (True, False):
        run = Run(linear, name)
        if structure_first:
            run.oialr.load_state_dict(*oialr)
            set_state_dict(
                run.model,
                run.optimizer,
                model_state_dict=copy.deepcopy(model),
                optim_state_dict=copy.deepcopy(optimizer),
            )
        else:
            set_model_state_dict(run.model, copy.deepcopy(model))
            set_optimizer_state_dict(run.model, run.optimizer, copy.deepcopy(optimizer))
            run.oialr.load_state_dict(*oialr)
        run.train(5)
        assert torch.equal(first.output(), run.output())


def wrapped(rank: int, size: int) -> list[bool]:
    World.from_environment(timeout_s=60)
    same = []
    for there, here in ((1, 6), (8, 4)):
        state = Run(linear, "SGD").train(there).state()
        saved = state["model"]
        net = linear()
        model = DistributedDataParallel(net)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        config = OIALRConfig(delay=3, frequency=2, rule=FixedFraction(0.3), layer_share_step=1.0)
        oialr = OIALR(model, optimizer, config)

        def train(steps: int, model: Any = model, optimizer: Any = optimizer, oialr: Any = oialr) -> None:
            for _ in range(steps):
                F.cross_entropy(model(X[rank::size]), Y[rank::size]).backward()
                optimizer.step()
                optimizer.zero_grad()
                oialr.step()

        train(here)
        if there == 1:
            oialr.load_state_dict(state["oialr"])  # low-rank layers become dense by this call
        model.load_state_dict({f"module.{key}": value for key, value in saved.items()})
        alone = linear()
        Run(linear, "SGD", alone).load({"model": saved}, ("model",))
        assert torch.equal(net(X), alone(X))
        train(3)
        flat = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
        every = [torch.empty_like(flat) for _ in range(size)]
        dist.all_gather(every, flat)
        same.append(torch.equal(*every))
    return same


def test_a_wrapper_goes_on_averaging_what_was_loaded() -> None:
    assert spawn(wrapped, 2) == [[True] * 2] * 2


def test_a_merged_model_loads_into_a_run_and_becomes_dense() -> None:
    run = Run(attention, "AdamW").train(8)
    dense = merge(run.model)
    run.model.load_state_dict(dense.state_dict())
    assert run.oialr.r == {}
    assert type(run.model.attention) is nn.MultiheadAttention
    torch.testing.assert_close(run.output(), dense(X).detach())
    run.train(1)
    assert len(run.oialr.r) == 4, "its own count goes on: past the delay, dense layers are converted again"
