"""Copies and pickles keep the lengths of steps, and a second optimizer is noticed."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from support.small_training import Accelerated, batch, controlled, settings, small_model, train
from torch import nn

from hpc_oialr import OIALR, low_rank_layers, muon_adamw
from hpc_oialr.errors import ModelError

MAKE: dict[str, Any] = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), 1e-2),
    "MuonAdamW": lambda m: muon_adamw(m, lr=0.02),
    "Accelerated": lambda m: Accelerated(torch.optim.Adam(m.parameters(), 1e-2)),
}


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", MAKE)
def test_controller_and_optimizer_together(name: str, how: str) -> None:
    """Before the conversion, and between it and a cut; the copy is no part of the original."""
    oialr, optimizer = controlled(MAKE[name], core_lr_scale=2.0)
    for _ in range(2):
        train(oialr, optimizer, 5 if oialr.r else 2)
        pair = (oialr, optimizer)
        twin, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
        assert twin.module is not oialr.module
        before = {key: value.clone() for key, value in oialr.module.state_dict().items()}
        losses = train(twin, other, 8)
        assert all(torch.equal(before[key], value) for key, value in oialr.module.state_dict().items())
        assert losses == train(oialr, optimizer, 8)
        assert twin.r == oialr.r
        for p, q in zip(twin.module.parameters(), oialr.module.parameters(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["AdamW", "MuonAdamW"])
def test_model_and_optimizer_without_the_controller(name: str, how: str) -> None:
    """Steps of cores are as long as before, in the same order or the other one, and of the optimizer alone."""
    oialr, optimizer = controlled(MAKE[name], core_lr_scale=3.0)
    train(oialr, optimizer, 5)
    optimizer.zero_grad()

    def copied(value: Any) -> Any:
        return copy.deepcopy(value) if how == "deepcopy" else pickle.loads(pickle.dumps(value))

    (model, first), (second, mirror), third = (
        copied((oialr.module, optimizer)),
        copied((optimizer, oialr.module)),
        copied(optimizer),
    )
    x, y = batch(9)
    for module, stepped in ((oialr.module, optimizer), (model, first), (mirror, second)):
        nn.functional.cross_entropy(module(x), y).backward()
        if module is oialr.module:
            # The optimizer copied alone has parameters that no model has: it gets the gradients by hand.
            for group, own in zip(third.param_groups, optimizer.param_groups, strict=True):
                for p, q in zip(group["params"], own["params"], strict=True):
                    p.grad = q.grad
            third.step()
        stepped.step()
    for p, q, s in zip(oialr.module.parameters(), model.parameters(), mirror.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, s)
    for group, own in zip(third.param_groups, optimizer.param_groups, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(group["params"], own["params"], strict=True))


def test_an_optimizer_made_anew_is_noticed() -> None:
    oialr, optimizer = controlled(MAKE["AdamW"], frequency=100)
    train(oialr, optimizer, 6)
    new = torch.optim.AdamW(oialr.module.parameters(), 1e-2)
    train(oialr, new, 2)
    with pytest.raises(ModelError, match=r"changed 3 times while the optimizer given to OIALR\(...\) did not step"):
        train(oialr, new, 1)


EACH: dict[nn.Parameter, torch.optim.Optimizer] = {}


class Holder:
    """As a training framework would keep them."""

    def __init__(self, each: dict[nn.Parameter, torch.optim.Optimizer]) -> None:
        self.each = each

    def hook(self, p: nn.Parameter) -> None:
        step_of(self.each, p)

    def __call__(self, p: nn.Parameter) -> None:
        step_of(self.each, p)


def step_of(each: dict[nn.Parameter, torch.optim.Optimizer], p: nn.Parameter) -> None:
    each[p].step()
    each[p].zero_grad()


def from_globals(p: nn.Parameter) -> None:
    EACH[p].step()
    EACH[p].zero_grad()


HOOKS: dict[str, Any] = {
    "closure": lambda each: lambda p: step_of(each, p),
    "globals": lambda each: from_globals,
    "method": lambda each: Holder(each).hook,
    "object": lambda each: Holder(each),
    "partial": lambda each: functools.partial(step_of, each),
    "closure over an object": lambda each: (lambda holder: lambda p: holder.hook(p))(Holder(each)),
}


def with_optimizers_in_hooks(model: nn.Module, make_hook: Any) -> None:
    EACH.clear()
    EACH.update({p: torch.optim.SGD([p], 0.1) for p in model.parameters()})
    hook = make_hook(EACH)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)


@pytest.mark.parametrize("place", HOOKS)
def test_optimizers_in_backward_hooks_are_named_and_refused(place: str) -> None:
    """Named at ``OIALR(...)``, and at the conversion if they come later; refused while cores are left as they are."""
    model = small_model()
    with_optimizers_in_hooks(model, HOOKS[place])
    named = "a hook on the weight of 0 steps a SGD of its own in the backward"
    with pytest.warns(UserWarning, match=named):
        OIALR(model, torch.optim.SGD(model.parameters(), 0.1))
    oialr, optimizer = controlled(MAKE["AdamW"])
    train(oialr, optimizer, 3)
    with_optimizers_in_hooks(oialr.module, HOOKS[place])
    with pytest.warns(UserWarning, match=named):
        train(oialr, optimizer, 1)


@pytest.mark.filterwarnings("ignore")
def test_cores_that_only_hooks_would_train_are_an_error() -> None:
    model = small_model()
    with_optimizers_in_hooks(model, HOOKS["globals"])
    named = "the core that takes its place will not be trained"
    with pytest.warns(UserWarning, match=named):
        oialr = OIALR(model, torch.optim.SGD(model.parameters(), 0.1), settings(delay=2, frequency=100))

    def loop() -> None:
        for t in range(8):
            x, y = batch(t)
            nn.functional.cross_entropy(oialr.model(x), y).backward()
            oialr.step()

    with pytest.raises(ModelError, match="stayed as they are|did not step"):
        loop()
    assert oialr.t <= 2 + 5


@pytest.mark.filterwarnings("ignore:post-accumulate-grad hooks")
@pytest.mark.parametrize("delay", [0, 1, 2, 3, 9])
def test_optimizers_that_no_inspection_finds_train_no_step_after_the_conversion(delay: int) -> None:
    hidden = [[[[EACH]]]]
    model = small_model()
    with_optimizers_in_hooks(model, lambda each: lambda p: step_of(hidden[0][0][0][0], p))
    oialr = OIALR(model, torch.optim.SGD(model.parameters(), 0.1), settings(delay=delay))

    def loop() -> None:
        for t in range(4):
            x, y = batch(t)
            nn.functional.cross_entropy(oialr.model(x), y).backward()
            oialr.step()

    with pytest.raises(ModelError, match="another optimizer trains them .* backward hooks"):
        loop()
    assert oialr.r == {}


def test_steps_that_were_skipped_and_writes_of_the_users_are_no_other_optimizer() -> None:
    """As under a GradScaler, and where weights are clipped, loaded or set."""
    oialr, optimizer = controlled(MAKE["AdamW"])
    for _ in range(5):
        oialr.step()  # skipped
    assert set(low_rank_layers(oialr.module)) == {"0", "2"}
    for _ in range(5):
        train(oialr, optimizer, 1)
        with torch.no_grad():
            low_rank_layers(oialr.module)["0"].S.clamp_(-1, 1)
        oialr.step()
