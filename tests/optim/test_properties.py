"""Any supported optimizer, under any schedule of conversion and cuts: stopping, wrapping and copying change no bit."""

from __future__ import annotations

import copy
import io
import pickle
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_training import Accelerated, Chained, small_model, train
from support.small_training import settings as method_settings
from support.spawn import spawn
from support.supported import CLOSURE, make_optimizer, missing
from torch import Tensor, nn

from hpc_oialr import OIALR, FixedFraction
from hpc_oialr.errors import ModelError
from hpc_oialr.optim.state_kinds import OPTIMIZERS
from hpc_oialr.processes import World

OWN = ("torch", "hpc_oialr", "schedulefree")
NAMES = sorted(name for name in OPTIMIZERS if name.partition(".")[0] in OWN and not missing(name))


@dataclass(frozen=True)
class Plan:
    """A run of 12 steps, and where and how it is disturbed."""

    name: str
    wrapper: str = "none"
    delay: int = 3
    frequency: int = 2
    fraction: float = 0.4
    carry_moments: bool = True
    use_closure: bool = False
    stops: tuple[tuple[int, str], ...] = ()


def plans(ways: tuple[str, ...]) -> st.SearchStrategy[Plan]:
    stops = st.lists(st.tuples(st.integers(1, 11), st.sampled_from(ways)), min_size=1, max_size=2)
    return st.builds(
        Plan,
        name=st.sampled_from(NAMES),
        wrapper=st.sampled_from(["none", "accelerated", "chained"]),
        delay=st.integers(1, 8),
        frequency=st.integers(1, 4),
        fraction=st.sampled_from([0.2, 0.5, 1.0]),
        carry_moments=st.booleans(),
        use_closure=st.booleans(),
        stops=stops.map(lambda stops: tuple(sorted(stops))),
    )


def begin(plan: Plan) -> tuple[OIALR, Any]:
    model = small_model()
    optimizer = make_optimizer(plan.name, model)
    if plan.wrapper == "accelerated":
        optimizer = Accelerated(optimizer)
    if plan.wrapper == "chained":
        optimizer = Chained(optimizer)
    config = method_settings(
        delay=plan.delay,
        frequency=plan.frequency,
        rule=FixedFraction(plan.fraction),
        carry_moments=plan.carry_moments,
    )
    return OIALR(model, optimizer, config), optimizer


def stopped(plan: Plan, oialr: OIALR, optimizer: Any, way: str) -> tuple[OIALR, Any]:
    """What goes on after an interruption: from a checkpoint, or from a copy."""
    if way == "deepcopy":
        return copy.deepcopy((oialr, optimizer))
    if way == "pickle":
        restored: tuple[OIALR, Any] = pickle.loads(pickle.dumps((oialr, optimizer)))
        return restored
    file = io.BytesIO()
    torch.save((oialr.state_dict(), oialr.module.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    method, values, state = torch.load(file, weights_only=True)
    oialr, optimizer = begin(plan)
    oialr.load_state_dict(method)
    oialr.module.load_state_dict(values)
    optimizer.load_state_dict(state)
    return oialr, optimizer


def run(plan: Plan, steps: int = 12) -> tuple[list[float], dict[str, int], dict[str, Tensor]]:
    oialr, optimizer = begin(plan)
    losses: list[float] = []
    for at, way in (*plan.stops, (steps, "")):
        inner = (
            optimizer.optimizers[0]
            if plan.wrapper == "chained"
            else getattr(optimizer, "optimizer", optimizer)
        )
        if callable(getattr(inner, "train", None)):
            inner.train()
        use_closure = plan.name in CLOSURE or plan.use_closure
        losses += train(oialr, optimizer, at - oialr.t, use_closure=use_closure)
        if way:
            oialr, optimizer = stopped(plan, oialr, optimizer, way)
    return losses, oialr.r, oialr.module.state_dict()


def check(plan: Plan) -> None:
    if plan.name in CLOSURE and plan.wrapper == "chained":
        plan = replace(plan, wrapper="none")  # it evaluates the closure itself, before any step
    losses, r, values = run(plan)
    expected_losses, expected_r, expected = run(replace(plan, stops=(), wrapper="none"))
    assert losses == expected_losses or str(losses) == str(expected_losses)  # NaN where L-BFGS diverges
    assert r == expected_r
    for key, value in expected.items():
        assert torch.equal(values[key].nan_to_num(), value.nan_to_num()), (plan, key)


@settings(max_examples=14, deadline=None, derandomize=True)
@given(plan=plans(("checkpoint", "deepcopy", "pickle")))
def test_on_one_process(plan: Plan) -> None:
    check(plan)


def on_two(rank: int, size: int, drawn: list[Plan]) -> str:
    World.from_environment(device="cpu")
    for plan in drawn:
        check(plan)
    oialr, optimizer = begin(drawn[0])
    with pytest.raises(ModelError, match="a controller of 2 processes cannot be copied or pickled"):
        copy.deepcopy((oialr, optimizer))
    return "done"


def drawn_plans(count: int) -> list[Plan]:
    """The same few of :func:`plans`, for processes that cannot ask hypothesis."""
    chance = random.Random(0)
    return [
        Plan(
            name=chance.choice([name for name in NAMES if name not in CLOSURE]),
            wrapper=chance.choice(["none", "accelerated", "chained"]),
            delay=chance.randint(1, 5),
            frequency=chance.randint(1, 3),
            fraction=chance.choice([0.2, 0.5]),
            carry_moments=chance.random() < 0.7,
            use_closure=chance.random() < 0.5,
            stops=((chance.randint(1, 11), "checkpoint"),),
        )
        for _ in range(count)
    ]


def test_on_two_processes() -> None:
    assert spawn(on_two, 2, drawn_plans(6)) == ["done", "done"]


def test_modules_are_not_shared_between_runs() -> None:
    first, second = (begin(Plan("torch.SGD"))[0].module for _ in range(2))
    assert isinstance(first, nn.Module)
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
