"""What a user's program does around the controller: other controllers, wrappers, changed layers, odd weights."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.spawn import spawn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune

from hpc_oialr import (
    OIALR,
    Budget,
    FixedFraction,
    OIALRConfig,
    RankLimits,
    RankRule,
    merge,
)
from hpc_oialr.distributed import World
from hpc_oialr.errors import ModelError, ReplicaMismatchError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def made(model: nn.Module, **options: Any) -> OIALR:
    settings: dict[str, Any] = {
        "delay": 2,
        "frequency": 2,
        "rule": FixedFraction(0.5),
        "layer_share_step": 1.0,
    }
    inner = getattr(model, "module", model)
    return OIALR(model, torch.optim.SGD(inner.parameters(), 0.1), OIALRConfig(**settings | options))


# -- two controllers ------------------------------------------------------------------------------------


def test_a_second_controller_is_refused_naming_the_first() -> None:
    model = network()
    first = made(model)
    for overlapping in (model, nn.Sequential(model, nn.Linear(4, 4)), model[2]):
        with pytest.raises(ModelError, match=r"belongs to OIALR\(step 0, 0 of 2 layers of Sequential low-rank\)"):
            made(overlapping)
    first.step(), first.step()
    with pytest.raises(ModelError, match=r"OIALR\(step 2, 2 of 2 layers.*detach\(\)"):
        made(model)


def test_a_controller_that_let_go_or_is_gone_and_copies_of_the_model_are_free() -> None:
    model = network()
    first = made(model)
    made(copy.deepcopy(model))
    hooks = first.optimizer._optimizer_step_pre_hooks
    assert len(hooks) == 1
    first.detach()
    assert not hooks
    second = made(model)
    del second
    gc.collect()
    made(model)
    assert len(model._forward_pre_hooks) == 1, "hooks of those before are off"
    assert not merge(model)._forward_pre_hooks


def test_controllers_of_separate_models_do_not_meet() -> None:
    both = nn.ModuleList([network(), network()])
    assert [made(part).layers for part in both] == [["0", "2"]] * 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda oialr: pickle.loads(pickle.dumps(oialr))])
def test_a_copy_of_a_controller_goes_on_with_its_own_model(copied: Any) -> None:
    first = made(network())
    first.step()
    second = copied(first)
    for oialr in (second, first):
        for _ in range(3):
            oialr.model(torch.ones(2, 12)).mean().backward()
            oialr.optimizer.step()
            oialr.optimizer.zero_grad()
            oialr.step()
        assert oialr.r == {"0": 6, "2": 8}
    assert torch.equal(first.module[2].weight, second.module[2].weight)
    with pytest.raises(ModelError, match=r"belongs to OIALR\(step 4"):
        made(second.module)


# -- layers changed behind its back ---------------------------------------------------------------------


def replace_weight(model: nn.Sequential) -> None:
    model[2].weight = nn.Parameter(torch.randn(16, 16))


def replace_layer(model: nn.Sequential) -> None:
    model[2] = nn.Linear(16, 16)


def remove_layer(model: nn.Sequential) -> None:
    del model[2]


def parametrize(model: nn.Sequential) -> None:
    parametrizations.weight_norm(model[2])


def pruned(model: nn.Sequential) -> None:
    prune.l1_unstructured(model[2], "weight", amount=0.5)


CHANGES = [
    (replace_weight, "layer 2 has another weight object .* it was replaced after OIALR"),
    (replace_layer, "layer 2 is no longer part of the model: it was replaced or removed"),
    (remove_layer, "layer 2 is no longer part of the model"),
    (parametrize, "layer 2 has no parameter 'weight' any more: it was parametrized"),
    (pruned, "layer 2 has no parameter 'weight' any more: it was parametrized, pruned"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_layer_changed_before_the_conversion_is_named(change: Any, message: str) -> None:
    model = network()
    oialr = made(model)
    oialr.step()
    change(model)
    with pytest.raises(ModelError, match=message):
        oialr.step()
    assert oialr.r == {}, "nothing was converted"


@pytest.mark.parametrize("change", [replace_layer, remove_layer])
def test_a_layer_changed_after_the_conversion_is_named(change: Any) -> None:
    model = network()
    oialr = made(model)
    for _ in range(3):
        oialr.step()
    change(model)
    with pytest.raises(ModelError, match="layer 2 is no longer part of the model"):
        oialr.step()


def test_a_parametrized_core_is_named() -> None:
    model = network()
    oialr = made(model)
    for _ in range(3):
        oialr.step()
    parametrizations.weight_norm(model[2], "S")
    with pytest.raises(ModelError, match="layer 2 has no parameter 'Vh' any more|layer 2 .* parametrized"):
        oialr.step()


# -- odd weights ----------------------------------------------------------------------------------------

RULES = [rule() for rule in RankRule.__subclasses__() if rule.__module__ == RankRule.__module__ and rule is not Budget]
RULES.append(Budget(operations=0.3))
WEIGHTS = {
    "zero": torch.zeros(16, 12),
    "one row": torch.zeros(16, 12).index_fill_(0, torch.tensor([3]), 1.0),
    "constant": torch.full((16, 12), 2.0),
    "r = 1": torch.outer(torch.arange(1.0, 17), torch.arange(1.0, 13)),
    "identity": torch.eye(16, 12),
    "tiny": torch.randn(16, 12, generator=torch.Generator().manual_seed(0)) * 1e-30,
    "huge": torch.randn(16, 12, generator=torch.Generator().manual_seed(0)) * 1e30,
    "denormal": torch.full((16, 12), 1e-42),
}
LIMITS = [
    RankLimits(),
    RankLimits(max_drop=1.0, min_fraction=0.0),
    RankLimits(max_drop=1.0, min_fraction=0.0, at_conversion=0.25, round_to=8),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_every_rule_keeps_finite_factors_of_every_weight(kind: str, rule: Any) -> None:
    for limits in LIMITS:
        model = network()
        with torch.no_grad():
            model[0].weight.copy_(WEIGHTS[kind])
        oialr = made(model, rule=rule, limits=limits)
        for _ in range(2):
            oialr.step()
        (before, *_), scale = oialr.r.values(), float(WEIGHTS[kind].abs().max())
        for _ in range(4):
            oialr.step()
            assert 1 <= oialr.r["0"] <= before
        layer = model[0]
        assert all(torch.isfinite(factor).all() for factor in layer.factors)
        eye = torch.eye(oialr.r["0"])
        torch.testing.assert_close(layer.U.mT @ layer.U, eye, atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.Vh @ layer.Vh.mT, eye, atol=1e-5, rtol=0)
        if kind in ("zero", "one row", "constant", "r = 1"):
            torch.testing.assert_close(layer.weight.detach(), WEIGHTS[kind], atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_rules_do_not_depend_on_the_scale(rule: Any) -> None:
    s = torch.linspace(1.0, 0.1, 12)
    wanted = rule.choose(s, 16, 12)
    for scale in (1e-30, 1e30):
        assert rule.choose(s * scale, 16, 12) == wanted


# -- several processes ----------------------------------------------------------------------------------


def around(rank: int, size: int) -> list[str]:
    World.from_environment(timeout_s=60)
    said = [late_wrapper(rank), late_outer_wrapper(rank), plain_call(rank), joined(rank)]
    ignored(rank)
    return said


def late_wrapper(rank: int) -> str:
    model = network()
    oialr = made(model)
    oialr.model(torch.ones(2, 12)).sum().backward()
    with pytest.raises(ModelError) as error:
        DistributedDataParallel(model)(torch.ones(2, 12))
    return str(error.value)


def late_outer_wrapper(rank: int) -> str:
    model = network()
    wrapped = DistributedDataParallel(model)
    oialr = made(wrapped)
    outer = DistributedDataParallel(nn.Sequential(model, nn.Linear(4, 4)))
    wrapped(torch.ones(2, 12))
    model(torch.ones(2, 12))
    with pytest.raises(ModelError) as error:
        outer(torch.ones(2, 12))
    assert oialr.model is wrapped
    return str(error.value)


def plain_call(rank: int) -> str:
    """No wrapper is called at all: gradients stay local, and the next change names what shows it."""
    model = network()
    oialr = made(model)
    for _ in range(2):
        model(torch.ones(2, 12) * (rank + 1)).mean().backward()
        oialr.optimizer.step()
        if oialr.t == 0:
            oialr.step()
    with pytest.raises(ReplicaMismatchError) as error:
        oialr.step()
    return str(error.value)


def joined(rank: int) -> str:
    wrapped = DistributedDataParallel(network())
    oialr = made(wrapped)
    with wrapped.join():
        wrapped(torch.ones(2, 12)).sum().backward()
        with pytest.raises(ModelError) as error:
            oialr.step()
    return str(error.value)


def ignored(rank: int) -> None:
    """What the wrapper leaves out differs between processes, and is no error; an attention's names change."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"own": nn.Linear(8, 8), "attention": nn.MultiheadAttention(8, 2, kdim=6), "last": nn.Linear(8, 4)}
    )
    left_out = ["own.weight", "own.bias", "attention.k_proj_weight"]
    model._ddp_params_and_buffers_to_ignore = left_out  # type: ignore[assignment]
    model.forward = lambda x, k: model["last"](model["attention"](model["own"](x), k, x)[0])  # type: ignore[method-assign]
    wrapped = DistributedDataParallel(model)
    nn.init.constant_(model["own"].bias, rank)
    log: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hpc_oialr")
    logger.addHandler(handler)
    level, _ = logger.level, logger.setLevel(logging.INFO)
    oialr = made(wrapped)
    logger.removeHandler(handler), logger.setLevel(level)
    assert "left dense: own, attention.k_proj (DistributedDataParallel ignores their weights)" in log
    for _ in range(6):
        wrapped(torch.ones(3, 2, 8) * (rank + 1), torch.ones(3, 2, 6) * (rank + 1)).square().mean().backward()
        oialr.optimizer.step()
        if oialr.t < 5:
            oialr.optimizer.zero_grad()
        oialr.step()
    assert set(oialr.r) == {"attention.q_proj", "attention.v_proj", "attention.out_proj"}
    averaged = [differ(p.grad) for p in (model["last"].weight, model["attention"].out_proj.S)]
    local = [differ(p.grad) for p in (model["own"].weight, model["attention"].k_proj.weight)]
    assert averaged == [False, False]
    assert local == [True, True]


def differ(gradient: torch.Tensor | None) -> bool:
    assert gradient is not None
    every = [torch.empty_like(gradient) for _ in range(dist.get_world_size())]
    dist.all_gather(every, gradient)
    return not torch.equal(*every)


def test_wrappers_that_are_not_kept_up_to_date_and_lost_synchronisation_are_errors() -> None:
    for late, outer, plain, joined in spawn(around, 2):
        assert "called by another DistributedDataParallel" in late
        assert late == outer
        assert "ranks hold different bits" in plain
        assert "4.weight" in plain or "4.bias" in plain
        assert "inside DistributedDataParallel.join()" in joined


def test_other_wrappers_are_refused_with_what_to_do() -> None:
    average = torch.optim.swa_utils.AveragedModel(network())
    with pytest.raises(ModelError, match=r"wrapped in AveragedModel.*averages=\[...\]"):
        made(average)
    with pytest.raises(ModelError, match="wrapped in DataParallel.*use DistributedDataParallel"):
        made(nn.DataParallel(network()))
    flat = type("FullyShardedDataParallel", (nn.Module,), {})()
    with pytest.raises(ModelError, match=r"wrapped in FullyShardedDataParallel.*fully_shard \(FSDP2\)"):
        OIALR(flat, torch.optim.SGD([nn.Parameter(torch.ones(2, 2))], 0.1))


def test_replicas_that_come_and_go_are_refused() -> None:
    wrapper = type("DistributedDataParallel", (nn.Sequential,), {"__module__": "torchft.ddp"})
    with pytest.raises(ModelError, match="DistributedDataParallel of torchft lets replicas leave.*--max-restarts"):
        made(wrapper(network()))
    around = type("OptimizerWrapper", (torch.optim.SGD,), {"__module__": "torchft.optim"})
    net = network()
    with pytest.raises(ModelError, match="OptimizerWrapper of torchft"):
        OIALR(net, around(net.parameters(), 0.1))
