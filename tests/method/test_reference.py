"""The fast path against the slow one, step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from hpc_oialr import OIALR, OIALRConfig
from hpc_oialr.lowrank import low_rank_layers
from hpc_oialr.method.reference import ReferenceLinear, ReferenceOIALR
from hpc_oialr.method.rules import (
    Budget,
    CumulativeSum,
    Energy,
    FixedFraction,
    NoiseEdge,
    OutputEnergy,
    RankLimits,
    RankRule,
    RelativeCutoff,
    StableRank,
)
from hpc_oialr.recipes import recipes
from hpc_oialr.train.load_config import load_config, paper_variant

OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=3e-3),
}
RULES = [
    (RelativeCutoff(0.3), RankLimits(round_to=1)),
    (CumulativeSum(0.8), RankLimits(at_conversion=0.7)),
    (Energy(0.9), RankLimits(max_drop=0.2)),
    (OutputEnergy(0.95), RankLimits(max_drop=0.4)),
    (NoiseEdge(), RankLimits(round_to=4)),
    (StableRank(3.0), RankLimits(min_fraction=0.3)),
    (FixedFraction(0.25), RankLimits(max_drop=0.3, round_to=1)),
    (Budget(parameters=0.1), RankLimits(max_drop=0.3, round_to=2)),
]
DELAY, FREQUENCY, STEPS = 8, 5, 40


def test_every_rule_is_compared() -> None:
    rules = {rule for rule in RankRule.__subclasses__() if rule.__module__ == RankRule.__module__}
    assert rules == {type(rule) for rule, _ in RULES}


def _model() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Linear(24, 48),
        nn.Tanh(),
        nn.Linear(48, 32),
        nn.Tanh(),
        nn.Linear(32, 40, bias=False),
        nn.Tanh(),
    ]
    return nn.Sequential(*layers, nn.Linear(40, 5)).double()


def _train(model, optimizer, after_step):
    """Losses and r of all layers after every step."""
    generator = torch.Generator().manual_seed(1)
    teacher, history = torch.randn(24, 5, generator=generator).double(), []
    for _ in range(STEPS):
        x = torch.randn(64, 24, generator=generator).double()
        loss = nn.functional.cross_entropy(model(x), (x @ teacher).argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append((loss.item(), after_step()))
    return history


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("rule", "limits"), RULES, ids=lambda value: type(value).__name__)
def test_the_fast_path_does_what_the_slow_one_does(name, rule, limits):
    config = OIALRConfig(
        delay=DELAY,
        frequency=FREQUENCY,
        rule=rule,
        limits=limits,
        layer_share_step=1.0 if rule.joint else 0.4,
        core_lr_scale=1.0,
        importance="weights",
    )
    compare(config, OPTIMIZERS[name])


@pytest.mark.parametrize("recipe", sorted(set(recipes()) - {"finetune_bert"}))
def test_the_published_variant_of_every_recipe_is_the_papers_algorithm(recipe):
    """Of a shorter run, with the same share of the layers in each update, cutoff, limits, zeroed moments and AdamW."""
    config = paper_variant(load_config(recipe)).config
    method, optimizer = config.oialr, config.optimizer
    compare(
        replace(method, delay=DELAY, frequency=2),
        lambda ps: torch.optim.AdamW(ps, lr=3e-3, weight_decay=optimizer.weight_decay),
        layers=["2", "4"] if method.selection.keep_first else ["0", "2", "4"],
    )


def compare(config, optimizer, layers=("0", "2", "4")):
    """Train with the controller and with the reference: same losses, r and weights after every step."""
    slow, fast = _model(), _model()
    slow_optimizer, fast_optimizer = optimizer(slow.parameters()), optimizer(fast.parameters())
    controller = OIALR(fast, fast_optimizer, config)
    reference = ReferenceOIALR(slow, slow_optimizer, controller.layers, config)

    def step_slowly():
        reference.step()
        found = {name: slow.get_submodule(name) for name in reference.layers}
        return {n: len(layer.S) for n, layer in found.items() if isinstance(layer, ReferenceLinear)}

    def step_fast():
        controller.step()
        return controller.r

    expected = _train(slow, slow_optimizer, step_slowly)
    seen = _train(fast, fast_optimizer, step_fast)
    assert controller.layers == list(layers)
    assert [r for _, r in seen] == [r for _, r in expected]
    assert expected[-1][1] != expected[DELAY - 1][1], "no layer was cut"
    torch.testing.assert_close(
        torch.tensor([loss for loss, _ in seen]),
        torch.tensor([loss for loss, _ in expected]),
        rtol=1e-8,
        atol=0,
    )
    for layer_name, layer in low_rank_layers(fast).items():
        twin = slow.get_submodule(layer_name)
        # Bases are the same up to signs; what they span, and the weight, are the same.
        for mine, other in ((layer.U, twin.U), (layer.Vh.mT, twin.Vh.mT)):
            torch.testing.assert_close(mine @ mine.mT, other @ other.mT, rtol=0, atol=1e-8)
        torch.testing.assert_close(layer.U @ layer.S @ layer.Vh, twin.U @ twin.S @ twin.Vh, rtol=0, atol=1e-8)
