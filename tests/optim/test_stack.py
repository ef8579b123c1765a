"""Wrappers around optimizers are seen through, and what cannot be seen through is refused."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.small_training import (
    CUT_NOTHING,
    Accelerated,
    Chained,
    Lookahead,
    MakeOptimizer,
    SharpnessAware,
    controlled,
    settings,
    small_model,
    train,
)
from support.spawn import spawn
from torch import nn

from hpc_oialr import OIALR, low_rank_layers, muon_adamw, register_optimizer_state
from hpc_oialr.distributed import World
from hpc_oialr.errors import ModelError


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-2)


def chained(model: nn.Module) -> Chained:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    return Chained(torch.optim.Muon(matrices, 0.02), torch.optim.AdamW(rest, 1e-2))


@pytest.mark.parametrize("use_closure", [False, True])
@pytest.mark.parametrize("make", [adamw, lambda m: muon_adamw(m, lr=0.02)])
def test_handing_on_changes_nothing(make: Any, use_closure: bool) -> None:
    """Steps of cores have their own length inside the wrapper, with a closure too."""
    plain, optimizer = controlled(make)
    wrapped, outer = controlled(lambda m: Accelerated(make(m)))
    assert train(plain, optimizer, 14) == train(wrapped, outer, 14, use_closure=use_closure)
    assert plain.r == wrapped.r
    assert wrapped.optimizer is outer


@pytest.mark.parametrize("use_closure", [False, True])
def test_slow_weights_follow(use_closure: bool) -> None:
    """Lookahead's state is its own, beside that of the optimizer inside; nothing is cut, so nothing changes."""
    losses = []
    for frequency in (3, 1000):
        oialr, optimizer = controlled(
            lambda m: Lookahead(torch.optim.SGD(m.parameters(), 0.2, momentum=0.9)),
            small_model(dtype=torch.float64),
            rule=CUT_NOTHING,
            frequency=frequency,
        )
        losses.append(train(oialr, optimizer, 16, use_closure=use_closure))
        core = low_rank_layers(oialr.module)["0"].S
        assert optimizer.state[core]["slow_params"].shape == core.shape
        assert len(optimizer.state) == len(list(optimizer.param_groups[0]["params"]))
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-9, atol=0)


def test_sharpness_aware_and_chained() -> None:
    oialr, optimizer = controlled(lambda m: SharpnessAware(m.parameters(), torch.optim.SGD, lr=0.1))
    losses = train(oialr, optimizer, 20, use_closure=True, same=True)
    assert losses[-1] < losses[0]
    assert "old_p" in optimizer.state[low_rank_layers(oialr.module)["2"].S]
    oialr, optimizer = controlled(chained)
    before = train(oialr, optimizer, 4)
    core = low_rank_layers(oialr.module)["0"].S
    start = core.detach().clone()
    train(oialr, optimizer, 2)
    assert any(p is core for p in optimizer.optimizers[0].param_groups[0]["params"])
    assert not torch.equal(core, start)
    assert before[-1] < before[0]


class Noting(Accelerated):
    """Writes into the state of what it wraps."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["note"] = p.grad.clone()
        return loss


def test_state_that_a_wrapper_writes_is_named_by_the_wrapper() -> None:
    oialr, optimizer = controlled(lambda m: Noting(adamw(m)))
    with pytest.raises(ModelError, match=r"Noting's state 'note' of 0 .*register_optimizer_state\(Noting, "):
        train(oialr, optimizer, 4)
    register_optimizer_state(Noting, {"note": "gradient"})
    oialr, optimizer = controlled(lambda m: Noting(adamw(m)))
    train(oialr, optimizer, 8)
    core = low_rank_layers(oialr.module)["0"].S
    assert optimizer.state[core]["note"].shape == core.shape


def test_lbfgs_goes_on_with_a_new_history() -> None:
    oialr, optimizer = controlled(lambda m: torch.optim.LBFGS(m.parameters(), 0.1, max_iter=3))
    train(oialr, optimizer, 4, use_closure=True, same=True)
    assert not optimizer.state
    core = low_rank_layers(oialr.module)["0"].S
    start = core.detach().clone()
    losses = train(oialr, optimizer, 12, use_closure=True, same=True)
    assert (core - start).norm() > 0
    assert losses[-1] < losses[0]
    with pytest.raises(Exception, match=r"must be 1 or \"auto\" with LBFGS, whose state \(its history of steps\)"):
        controlled(lambda m: torch.optim.LBFGS(m.parameters()), core_lr_scale=2.0)


class OwnList(torch.optim.SGD):
    def __init__(self, params: Any, where: str) -> None:
        super().__init__(params, 0.1)
        weights = self.param_groups[0]["params"]
        if where == "attribute":
            self.flat = weights[:]
        elif where == "key":
            self.owner = {p: i for i, p in enumerate(weights)}
        elif where == "copy":
            self.masters = [[p.detach().clone() for p in weights]]
        else:
            self.param_groups[0]["masters"] = [p.detach().clone() for p in weights]


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("attribute", "OwnList keeps the weight of 0 in its attribute 'flat'"),
        ("key", "keeps the weight of 0 in its attribute 'owner'"),
        ("copy", "keeps a tensor of the shape of 0 in its attribute 'masters'"),
        ("group", "keeps a tensor of the shape of 0 in its groups' 'masters'"),
    ],
)
def test_lists_of_an_optimizers_own_are_refused(where: str, text: str) -> None:
    model = small_model()
    with pytest.raises(ModelError, match=f"{text}, where it would stay dense"):
        OIALR(model, OwnList(model.parameters(), where))


class Duck:
    def __init__(self, params: Any) -> None:
        self.param_groups, self.state = [{"params": list(params), "lr": 0.1}], {}

    def step(self) -> None:
        pass


def test_what_is_no_optimizer_is_refused() -> None:
    model = small_model()
    with pytest.raises(ModelError, match=r"Duck does not behave as a torch.optim.Optimizer.*Pass the optimizer itself"):
        OIALR(model, Duck(model.parameters()))  # type: ignore[arg-type]
    for nothing in ([], [model]):
        with pytest.raises(ModelError, match="has no param_groups"):
            OIALR(model, nothing)  # type: ignore[arg-type]


class Around:
    """Hands on to an optimizer, or several, that it keeps in an attribute of any name."""

    def __init__(self, inside: Any) -> None:
        self.wrapped = inside
        self.all = inside if isinstance(inside, list) else [inside]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for each in self.all for group in each.param_groups]

    def zero_grad(self) -> None:
        for each in self.all:
            each.zero_grad()

    def step(self) -> None:
        for each in self.all:
            each.step()


def test_several_in_a_list_and_wrappers_with_attributes_of_any_name() -> None:
    losses = []
    for wrap in (lambda both: both.optimizers, Around, lambda both: Around(both.optimizers)):
        model = small_model()
        both = chained(model)
        oialr = OIALR(model, wrap(both), settings())
        losses.append(train(oialr, both, 14))
        assert oialr.r == {"0": 6, "2": 8}
    assert losses[0] == losses[1] == losses[2]


class Hidden(torch.optim.Optimizer):
    """Keeps its parameters where nobody can look; writes in place, or through ``.data``."""

    def __init__(self, params: Any, where: str) -> None:
        weights = list(params)
        super().__init__(weights, {"lr": 0.1})
        self.where = where
        self.held = SimpleNamespace(weights=weights) if where == "object" else lambda: weights

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.held.weights if self.where == "object" else self.held():
            if p.grad is not None:
                (p.data if self.where == "data" and p.dim() > 1 else p).sub_(0.1 * p.grad)


@pytest.mark.filterwarnings("ignore:2 parameters that OIALR has replaced")
@pytest.mark.parametrize("where", ["object", "closure", "data"])
def test_cores_that_nobody_steps_are_an_error(where: str) -> None:
    oialr, optimizer = controlled(lambda m: Hidden(m.parameters(), where), small_model())
    with pytest.raises(ModelError, match="had gradients and stayed as they are in 4 steps.*param_groups"):
        train(oialr, optimizer, 9)
    assert oialr.t < 9


def test_cores_stepped_through_data_at_a_rate_of_zero_or_not_at_all_are_no_error() -> None:
    class Data(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    (p.data if p.dim() > 1 else p).sub_(group["lr"] * p.grad)

    def grouped(m: nn.Module) -> Data:
        by_axes = [{"params": [p for p in m.parameters() if p.dim() == d], "lr": 0.1 * (d == 1)} for d in (1, 2)]
        return Data(by_axes, {})

    for make in (lambda m: Data(m.parameters(), {"lr": 0.1}), grouped):
        oialr, optimizer = controlled(make)
        train(oialr, optimizer, 14)
        assert oialr.r == {"0": 6, "2": 8}
    oialr, optimizer = controlled(adamw)
    train(oialr, optimizer, 5)
    for _ in range(8):  # gradients for the last layer only
        nn.functional.linear(torch.ones(2, 16), oialr.module[4].weight).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        oialr.step()


def test_a_core_that_left_the_groups_is_an_error() -> None:
    oialr, optimizer = controlled(adamw)
    train(oialr, optimizer, 5)
    optimizer.param_groups[0]["params"] = [p for p in optimizer.param_groups[0]["params"] if p.dim() == 1]
    with pytest.raises(ModelError, match=r"shape \(12, 12\) is in no group of the optimizer \(AdamW\)"):
        train(oialr, optimizer, 3)
    assert oialr.r == {"0": 12, "2": 16}


def on_two_processes(rank: int, size: int) -> dict[str, Any]:
    """Losses of global batches with each optimizer, and the text of an error that one process alone finds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own module compiles functions as it is imported
        from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
        from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
    World.from_environment(device="cpu")
    results: dict[str, Any] = {}
    makers = {
        "plain": adamw,
        "zero": lambda m: ZeroRedundancyOptimizer(m.parameters(), torch.optim.AdamW, lr=1e-2),
        "post local": lambda m: PostLocalSGDOptimizer(adamw(m), PeriodicModelAverager(period=2)),
    }
    for name, make in makers.items():
        oialr, optimizer = controlled(make)
        losses = train(oialr, optimizer, 14)
        results[name] = (losses, oialr.r, [p.detach().clone() for p in oialr.module.parameters()])
    results["resumed"] = [resumed(makers["zero"], order) for order in ("mpo", "omp", "opm")]
    oialr, optimizer = controlled(makers["zero"])
    train(oialr, optimizer, 3)
    for state in optimizer.optim.state.values():
        if rank == 1:
            state["extra"] = torch.ones_like(state["exp_avg"])
    try:
        train(oialr, optimizer, 1)
    except ModelError as error:
        results["error"] = str(error)
    results["r"] = oialr.r
    options = {"parameters_as_bucket_view": True, "lr": 1.0}
    try:
        controlled(lambda m: ZeroRedundancyOptimizer(m.parameters(), torch.optim.SGD, **options))
    except ModelError as error:
        results["view"] = str(error)
    return results


def resumed(make: MakeOptimizer, order: str) -> list[float]:
    """Losses of a run whose model, optimizer and controller (m, p, o) are loaded into one that has trained on."""
    oialr, optimizer = controlled(make)
    losses = train(oialr, optimizer, 8)
    optimizer.consolidate_state_dict(0)
    moments = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(moments)
    parts = copy.deepcopy({"m": oialr.module.state_dict(), "o": oialr.state_dict(), "p": moments[0]})
    oialr, optimizer = controlled(make)
    train(oialr, optimizer, 5)
    own = {"m": oialr.module, "o": oialr, "p": optimizer}
    for part in order:
        own[part].load_state_dict(parts[part])
    return losses + train(oialr, optimizer, 6)


def test_optimizers_of_several_processes() -> None:
    first, second = spawn(on_two_processes, 2)
    for name in ("zero", "post local"):
        assert first[name][:2] == first["plain"][:2]
        for p, q, s in zip(first[name][2], first["plain"][2], second[name][2], strict=True):
            assert torch.equal(p, q)
            assert torch.equal(p, s)
    assert first["resumed"] == second["resumed"] == [first["plain"][0]] * 3
    assert "another rank found optimizer state" in first["error"]
    assert "AdamW's state 'extra' of " in second["error"]
    assert first["r"] == second["r"] == {}
    assert "parameters_as_bucket_view=True keeps buckets of the dense weights" in first["view"]
