"""Every supported optimizer goes through the method; every other one is refused before anything is changed."""

from __future__ import annotations

import copy
import re
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.small_training import CUT_NOTHING, batch, controlled, small_model, train
from torch import Tensor, nn

from hpc_oialr import OIALR, low_rank_layers, merge, register_optimizer_state
from hpc_oialr.errors import ConfigError, ModelError
from hpc_oialr.optim.state import transform_state

MAKE: dict[str, Any] = {
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), 1e-2),
    "Adadelta": lambda m: torch.optim.Adadelta(m.parameters(), 0.1),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters(), 1e-2),
    "Adamax": lambda m: torch.optim.Adamax(m.parameters(), 1e-3),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), 1e-3),
    "RMSprop, centred": lambda m: torch.optim.RMSprop(m.parameters(), 1e-3, centered=True, momentum=0.5),
    "Rprop": lambda m: torch.optim.Rprop(m.parameters(), 1e-3),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9),
}


@pytest.mark.parametrize("name", MAKE)
def test_no_jump_after_an_update_that_cuts_nothing(name: str) -> None:
    """Where second moments were set to zero, steps were four times as long."""
    options = {"delay": 10, "frequency": 10, "rule": CUT_NOTHING, "core_lr_scale": 1.0}
    oialr, optimizer = controlled(MAKE[name], **options)
    moves = []
    for _ in range(30):
        before = merge(copy.deepcopy(oialr.module))[0].weight.detach().clone()
        x, y = batch(0)
        nn.functional.cross_entropy(oialr.model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        moves.append((merge(copy.deepcopy(oialr.module))[0].weight - before).norm().item())
        oialr.step()
    assert moves[20] < 1.5 * max(moves[15:20])
    assert all(torch.isfinite(p).all() for p in oialr.module.parameters())


class ScheduleFree(torch.optim.Optimizer):
    """Arbitrary in every line but one: what the state holds is a weight, by the key ``z``."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.5})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state.setdefault("z", p.clone())
            k = state["k"] = state.get("k", 0) + 1
            average = (p - 0.1 * state["z"]) / 0.9
            state["z"] -= self.param_groups[0]["lr"] * p.grad
            p.copy_(0.1 * state["z"] + 0.9 * average.lerp(state["z"], 1 / k))


class SlowAverage(torch.optim.SGD):
    """A copy of the weight under a key of its own."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                trail = self.state[p].setdefault("trail", p.clone())
                trail.lerp_(p, 0.1)
                p.lerp_(trail, 0.1)
        return loss


class Signs(torch.optim.Optimizer):
    """State that nobody knows, of the weight's shape."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            votes = self.state[p].setdefault("votes", torch.zeros_like(p))
            votes.lerp_(p.grad, 0.5)
            p.sub_(votes.sign(), alpha=self.param_groups[0]["lr"])


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("kind", [ScheduleFree, SlowAverage])
def test_weights_in_the_state_turn_as_the_weight_does(kind: Any, carry: bool) -> None:
    """Updates that cut nothing change nothing, and weights are not zeroed even where moments are."""
    if kind is SlowAverage:
        register_optimizer_state(SlowAverage, {"trail": "weight"})
    make = (lambda m: kind(m.parameters())) if kind is ScheduleFree else (lambda m: kind(m.parameters(), 0.1))
    losses = []
    for frequency in (3, 1000):
        options = {"rule": CUT_NOTHING, "frequency": frequency, "carry_moments": carry}
        oialr, optimizer = controlled(make, small_model(dtype=torch.float64), **options)
        losses.append(train(oialr, optimizer, 16))
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-9, atol=0)
    assert losses[0][-1] < losses[0][4] + 0.3


def orthonormal(m: int, r: int) -> Tensor:
    return torch.linalg.qr(torch.randn(m, r, dtype=torch.float64)).Q


def test_factored_second_moments_are_those_of_the_turned_product() -> None:
    torch.manual_seed(0)
    U, Vh = orthonormal(8, 3), orthonormal(6, 3).mT
    for rows, columns, axis in (("row_var", "col_var", True), ("exp_avg_sq_row", "exp_avg_sq_col", False)):
        weight = nn.Parameter(torch.zeros(8, 6, dtype=torch.float64))
        R, C = torch.rand(8, 1, dtype=torch.float64) + 0.1, torch.rand(1, 6, dtype=torch.float64) + 0.1
        C *= R.mean() / C.mean()
        optimizer = torch.optim.Adafactor([weight])
        optimizer.state[weight] = {rows: R if axis else R[:, 0], columns: C if axis else C[0]}
        transform_state(optimizer, weight, U, Vh)
        got = optimizer.state[weight]
        assert (got[rows].shape, got[columns].shape) == (((3, 1), (1, 3)) if axis else ((3,), (3,)))
        a, b = got[rows].reshape(3, 1), got[columns].reshape(1, 3)
        torch.testing.assert_close(a * b / a.mean(), (U * U).mT @ (R * C / R.mean()) @ (Vh * Vh).mT)


@pytest.mark.parametrize("axis", [True, False])
@pytest.mark.parametrize("shape", [(8, 1, 3), (8, 2, 3), (8, 1, 3, 3)])
def test_factored_second_moments_of_convolutions(shape: tuple[int, ...], axis: bool) -> None:
    """One matrix of means for each position of the kernel; with one input channel an axis of 1 is no mean's."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    n = weight.numel() // 8
    U, Vh = orthonormal(8, 3), orthonormal(n, 3).mT
    optimizer = torch.optim.Adafactor([weight])
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    R, C = state["row_var"].clone(), state["col_var"].clone()
    V = (R * C / R.mean(-2, keepdim=True)).reshape(8, n)
    if not axis:
        state["row_var"], state["col_var"] = R.squeeze(-1), C.squeeze(-2)
    transform_state(optimizer, weight, U, Vh)
    want = (U * U).mT @ V @ (Vh * Vh).mT
    torch.testing.assert_close(state["row_var"], want.mean(-1, keepdim=axis))
    torch.testing.assert_close(state["col_var"], want.mean(-2, keepdim=axis))


def test_centred_second_moment_stays_above_the_square_of_the_mean() -> None:
    torch.manual_seed(0)
    U, Vh = orthonormal(8, 3), orthonormal(6, 3).mT
    weight = nn.Parameter(torch.zeros(8, 6, dtype=torch.float64))
    mean = 5 * torch.outer(U[:, 0], Vh[0])  # a gradient that hardly changes
    optimizer = torch.optim.RMSprop([weight], centered=True)
    optimizer.state[weight] = {"square_avg": mean.square() + 1e-6, "grad_avg": mean.clone()}
    transform_state(optimizer, weight, U, Vh)
    state = optimizer.state[weight]
    torch.testing.assert_close(
        state["square_avg"] - state["grad_avg"].square(), torch.full((3, 3), 1e-6, dtype=torch.float64)
    )


class MADGRAD(torch.optim.Optimizer):
    """The weight follows from sums of gradients (arXiv 2101.11075)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01, "eps": 1e-6, "momentum": 0.9})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state |= {"grad_sum_sq": torch.zeros_like(p), "s": torch.zeros_like(p), "x0": p.clone()}
            state["s"] += 0.01 * p.grad
            state["grad_sum_sq"].addcmul_(p.grad, p.grad, value=0.01)
            p.lerp_(state["x0"] - state["s"] / (state["grad_sum_sq"].pow(1 / 3) + 1e-6), 0.1)


def test_the_anchor_of_madgrad_is_moved_so_that_its_target_stays() -> None:
    register_optimizer_state(MADGRAD, {"grad_sum_sq": "square", "s": "gradient", "x0": "weight"})
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 6, dtype=torch.float64))
    U, Vh = orthonormal(8, 3), orthonormal(6, 3).mT
    optimizer = MADGRAD([weight])
    weight.grad = torch.randn_like(weight)
    optimizer.step()

    def target() -> Tensor:
        state = optimizer.state[weight]
        return state["x0"] - state["s"] / (state["grad_sum_sq"].pow(1 / 3) + 1e-6)

    before = target()
    transform_state(optimizer, weight, U, Vh)
    torch.testing.assert_close(target(), U.mT @ before @ Vh.mT)


REFUSED: dict[str, Any] = {
    "Shampoo": "basis or preconditioner of its own",
    "SM3": "sums over rows or columns",
    "Prodigy": "one step size from sums over all entries",
    "AdamW8bit": "quantised state",
    "LionFp8": "quantised state",
    "Ftrl": "computes the weight anew",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_at_the_start(name: str) -> None:
    model = small_model()
    foreign = type(name, (torch.optim.Optimizer,), {"step": torch.optim.SGD.step})
    optimizer = foreign(model.parameters(), {})
    with pytest.raises(ModelError, match=f"{name} .*{REFUSED[name]}.*AdamW, SGD.*work.*register_optimizer_state"):
        OIALR(model, optimizer)


def test_sparse_adam_is_refused() -> None:
    model = small_model()
    with pytest.raises(ModelError, match="SparseAdam takes sparse gradients"):
        OIALR(model, torch.optim.SparseAdam(list(model.parameters())))


def test_unknown_state_changes_nothing_and_the_line_of_the_message_helps() -> None:
    oialr, optimizer = controlled(lambda m: Signs(m.parameters()))
    line = re.escape('hpc_oialr.register_optimizer_state(Signs, {"votes": "gradient"})')
    train(oialr, optimizer, 3)
    before = copy.deepcopy(oialr.module.state_dict())
    x, y = batch(3)
    optimizer.zero_grad()
    nn.functional.cross_entropy(oialr.model(x), y).backward()
    with pytest.raises(ModelError, match=f"Signs's state 'votes' of 0 .*{line}"):
        oialr.step()
    assert list(oialr.module.state_dict()) == list(before)
    oialr.detach()
    with pytest.raises(ModelError, match="state 'votes' of 0 "):  # at the start, where there is state already
        OIALR(oialr.module, optimizer)
    register_optimizer_state(Signs, {"votes": "gradient"})
    oialr, optimizer = controlled(lambda m: Signs(m.parameters()))
    train(oialr, optimizer, 12)
    assert set(oialr.r.values()) == {6, 8}
    assert optimizer.state[low_rank_layers(oialr.module)["0"].S]["votes"].any()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.ones(20), r"state 'extra' of 0 has shape \(20,\).*factored, sketched or quantised"),
        (torch.ones(20, 12, dtype=torch.uint8), "quantised or not of real numbers"),
        ([torch.ones(20, 12)], "a list of tensors"),
        ({"a": torch.ones(20, 12)}, "a dict of tensors"),
        ({"a": ([torch.ones(20, 12)], 3)}, "a dict of tensors"),
        (deque([torch.ones(20, 12)]), "a deque of tensors"),
        (SimpleNamespace(a=torch.ones(20, 12)), "a SimpleNamespace of tensors"),
    ],
)
def test_state_of_another_form_is_refused(value: Any, text: str) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.state[model[0].weight] = {"extra": value}
    with pytest.raises(ModelError, match=text):
        OIALR(model, optimizer)


def test_scalars_of_any_form_stay() -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    optimizer = torch.optim.SGD([weight], 0.1)
    extra = {"a": torch.tensor(2.0), "b": torch.ones(1), "c": 3, "d": None, "e": [1, 2], "f": "name"}
    optimizer.state[weight] = dict(extra)
    transform_state(optimizer, weight, torch.eye(4)[:, :2], torch.eye(4)[:2])
    assert optimizer.state[weight] == extra


def test_registering_checks_the_kind() -> None:
    with pytest.raises(ConfigError, match="the kind of 'm' is 'momentum'.*must be one of 'gradient'"):
        register_optimizer_state(Signs, {"m": "momentum"})  # type: ignore[dict-item]


def test_a_step_length_of_the_cores_is_refused_where_the_state_sets_the_weight() -> None:
    with pytest.raises(ConfigError, match=r'core_lr_scale is 3.0; must be 1 or "auto" with ASGD.* \(ax\)'):
        controlled(lambda m: torch.optim.ASGD(m.parameters(), 0.1), core_lr_scale=3.0)
    oialr, optimizer = controlled(lambda m: ScheduleFree(m.parameters()), core_lr_scale=3.0)
    with pytest.raises(ConfigError, match=r'must be 1 or "auto" with ScheduleFree.* \(z\)'):
        train(oialr, optimizer, 5)
    assert not low_rank_layers(oialr.module)
