"""A low-rank state that is loaded before ``OIALR(...)`` is called, as Lightning and Trainer do: same run as ever."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from support.saved_runs import Run, X, Y, attention, groups, in_step, linear, separate
from support.spawn import spawn
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from hpc_oialr import OIALR, OIALRConfig, Selection, low_rank_layers, match_structure
from hpc_oialr.distributed import World
from hpc_oialr.errors import ModelError

MAKE = {"attention": attention, "separate": separate, "linear": linear}


def resumed(state: dict[str, Any], make: Any, name: str, here: int) -> Run:
    """The model's state first, then optimizer and controller, then theirs."""
    torch.manual_seed(1)
    model = make() if here == 0 else Run(make, name).train(here).model
    match_structure(model, state["model"])
    model.load_state_dict(state["model"])
    return Run(make, name, model).load(state, ("optimizer", "oialr"))


@pytest.mark.parametrize(
    ("make", "name", "phases"),
    [("attention", "AdamW", (4, 6, 8)), ("separate", "MuonAdamW", (6,)), ("linear", "SGD", (1, 8))],
)
def test_a_state_loaded_before_the_controller_is_made_is_the_same_run(make: str, name: str, phases: Any) -> None:
    for phase in phases:
        first = Run(MAKE[make], name).train(phase)
        state = first.state()
        first.train(5)
        # Into a dense model, and into those of other phases whose controller is gone.
        for here in (0, 5, 1):
            second = resumed(state, MAKE[make], name, here)
            assert groups(second) == groups(Run(MAKE[make], name).train(phase))
            second.train(5)
            assert torch.equal(first.output(), second.output()), (phase, here)
            assert groups(first) == groups(second)
            in_step(second)


@pytest.mark.parametrize("name", ["AdamW", "MuonAdamW"])
@pytest.mark.parametrize("make", ["attention", "linear"])
def test_a_low_rank_model_goes_on_under_a_new_controller(make: str, name: str) -> None:
    """A second controller after the first, with the optimizer's hooks of the first gone; copies and pickles."""
    first = Run(MAKE[make], name).train(6)
    pair = (first.model, first.optimizer)
    copies = [copy.deepcopy(pair), pickle.loads(pickle.dumps(pair)), pair]
    count = first.oialr.state_dict(), first.oialr.tensor_state()
    first.optimizer = first.oialr = None  # type: ignore[assignment]
    gc.collect()
    outputs = []
    for model, optimizer in copies:
        second = Run.__new__(Run)
        config = Run(linear, name).oialr.config
        second.model, second.optimizer = model, optimizer
        second.oialr = OIALR(model, optimizer, config)
        second.oialr.load_state_dict(*copy.deepcopy(count))
        outputs.append(second.train(5).output())
        in_step(second)
    undisturbed = Run(MAKE[make], name).train(11)
    assert all(torch.equal(undisturbed.output(), output) for output in outputs)


def test_dense_again_by_a_load_after_adoption() -> None:
    """Weights come back to the groups, and places in them, of an optimizer that never saw them."""
    for name in ("MuonAdamW", "AdamW"):
        dense, late = Run(attention, name).train(2), Run(attention, name).train(8)
        run = resumed(late.state(), attention, name, 0).train(1)
        run.load(dense.state(), ("model", "optimizer", "oialr"))
        assert groups(run) == groups(dense)
        assert torch.equal(run.train(6).output(), dense.train(6).output())


def test_what_cannot_be_taken_over_is_refused_with_the_call_to_make() -> None:
    state = Run(linear, "AdamW").train(6).state()["model"]
    model = linear()
    match_structure(model, state)
    with pytest.raises(ModelError, match=r"layer 1 is low-rank already, but oialr.selection .*not selected"):
        OIALR(model, torch.optim.SGD(model.parameters(), 0.1), OIALRConfig(selection=Selection(exclude=("1",))))
    run = Run(linear, "AdamW", model)
    with pytest.raises(ModelError, match=r"layer 1 has no values: .*model.load_state_dict\(...\)"):
        run.model(X)
    average = torch.optim.swa_utils.AveragedModel(linear())
    with pytest.raises(ModelError, match="layer 1 is low-rank with r = .*not so, or in other bases, in a running"):
        OIALR(twin := copy.deepcopy(model), torch.optim.SGD(twin.parameters(), 0.1), averages=[average])
    with pytest.raises(ModelError, match=r"low-rank layer 'module.1' that this model does not have"):
        match_structure(linear(), {f"module.{key}": value for key, value in state.items()})


def test_an_optimizer_state_of_another_structure_names_the_call() -> None:
    """As when the model's low-rank state was ignored, by ``strict=False`` before there was a controller."""
    state = Run(linear, "AdamW").train(6).state()
    model = linear()
    assert model.load_state_dict(state["model"], strict=False).unexpected_keys
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    optimizer.load_state_dict(state["optimizer"])
    with pytest.raises(
        ModelError, match=r"as of a core with r = .*match_structure\(model, state_dict\) and model.load"
    ):
        OIALR(model, optimizer)


def test_an_empty_optimizer_state_belongs_to_no_structure() -> None:
    """Accelerate's ``prepare`` loads an optimizer's state into itself, then ``load_state`` the model's and its."""
    first = Run(linear, "AdamW").train(6)
    state, second = first.state(), Run(linear, "AdamW")
    second.optimizer.load_state_dict(second.optimizer.state_dict())
    second.load(state, ("model", "optimizer", "oialr"))
    assert torch.equal(first.train(5).output(), second.train(5).output())


def wrapped(rank: int, size: int, state: dict[str, Any]) -> tuple[bool, torch.Tensor]:
    """As Lightning does it; and with a wrapper that was made before the structure, around the module inside."""
    World.from_environment(timeout_s=60)
    outputs = []
    for late in (False, True):
        net = attention()
        if late:
            model = DistributedDataParallel(net)
        match_structure(net, state["model"])
        net.load_state_dict(state["model"])
        if not late:
            model = DistributedDataParallel(net)
            with pytest.raises(ModelError, match="would keep the old ones: call it for the model before"):
                match_structure(model, {f"module.{key}": x for key, x in attention().state_dict().items()})
        run = Run(attention, "AdamW", model)
        run.load({**state, "model": {}}, ("optimizer", "oialr"))
        assert run.oialr.model is model
        for _ in range(4):
            F.cross_entropy(model(X[rank::size]), Y[rank::size]).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.oialr.step()
        outputs.append(net(X).detach())
    return torch.equal(*outputs), outputs[0]


def test_lightnings_order_on_two_processes() -> None:
    first = Run(attention, "AdamW").train(6)
    (same, output), (_, other) = spawn(wrapped, 2, first.state())
    assert same
    assert torch.equal(output, other)
    torch.testing.assert_close(output, first.train(4).output(), rtol=1e-3, atol=1e-4)


def test_one_projection_of_an_attention_loads_with_its_optimizer() -> None:
    """Bypassing the attention that is its owner."""
    for make, child in ((attention, "in_proj"), (separate, "v_proj")):
        late, run = Run(make, "AdamW").train(8), Run(make, "AdamW").train(4)
        part = run.model.attention.get_submodule(child)
        part.load_state_dict(late.model.attention.get_submodule(child).state_dict())
        assert run.oialr.r[f"attention.{child}"] == late.oialr.r[f"attention.{child}"]
        in_step(run)
        before = part.S.detach().clone()
        run.train(1)
        assert not torch.equal(before, part.S)
        weight = nn.Linear(part.in_features, part.out_features, bias=False).state_dict()
        part.load_state_dict(weight)
        assert f"attention.{child}" not in run.oialr.r
        assert torch.equal(part.weight, weight["weight"])
        in_step(run)
        run.train(1)
        in_step(run)


def test_a_user_who_looks_into_a_trained_model_needs_no_controller() -> None:
    run = Run(separate, "AdamW").train(8)
    model = separate()
    assert match_structure(model, run.model.state_dict()) == run.oialr.layers
    model.load_state_dict(run.model.state_dict())
    assert torch.equal(model(X), run.output())
    assert match_structure(model, run.model.state_dict()) == []
    other = Run(separate, "AdamW").train(4)
    assert match_structure(other.model, run.model.state_dict())
    assert other.oialr.r == run.oialr.r, "with a controller it is the controller's work"
    in_step(other)
    assert len(low_rank_layers(other.model)) == 6
