"""Predicted r against r as the method makes it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hpc_oialr import OIALR, Budget, FixedFraction, OIALRConfig, RankLimits, RelativeCutoff
from hpc_oialr.plan.schedule import phases, predictable_rule


def run(config: OIALRConfig, steps: int) -> tuple[dict[str, tuple[int, int]], list[dict[str, int]]]:
    """Shapes of the layers, and r after every step of a real run."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(5)), nn.Linear(24, 10), nn.Linear(10, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    oialr = OIALR(model, optimizer, config)
    shapes, seen = {target.name: target.shape for target in oialr.targets}, []
    for _ in range(steps):
        oialr.model(torch.randn(4, 24)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        oialr.step()
        seen.append(oialr.r)
    return shapes, seen


@pytest.mark.parametrize(
    "config",
    [
        {"delay": 3, "frequency": 2, "layer_share_step": 1.0},
        {"delay": 4, "frequency": 3, "layer_share_step": 0.3},
        {"delay": 0, "frequency": 1, "layer_share_step": 0.5},
        {"delay": 0, "frequency": 4, "layer_share_step": 1.0},
        {"delay": 50, "frequency": 4},
        {"delay": 3, "frequency": 2, "layer_share_step": 1.0, "grow": 0.1},
        {"delay": 4, "frequency": 3, "layer_share_step": 0.3, "grow": 0.2},
        {"delay": 3, "frequency": 2, "layer_share_step": 1.0, "grow": 0.1, "bases_trained": [(6, 11), (13, 14)]},
    ],
)
def test_the_sequence_is_the_methods(config):
    limits = RankLimits(at_conversion=0.7, max_drop=0.3, min_fraction=0.2, round_to=2)
    settings = OIALRConfig(rule=FixedFraction(0.25), limits=limits, **config)
    shapes, seen = run(settings, 20)
    predicted: list[dict[str, int]] = []
    for phase in phases(settings, shapes, 20):
        if predicted:
            # The event is at the end of the step before.
            predicted[-1] = dict(phase.r)
        predicted += [dict(phase.r)] * phase.steps
    assert predicted == seen
    assert sum(phase.steps for phase in phases(settings, shapes, 20)) == 20


def test_steps_with_trained_bases_are_phases_of_their_own():
    config = OIALRConfig(delay=3, frequency=4, rule=FixedFraction(0.5), bases_trained=[(1, 5), (7, 9), (12, None)])
    found = phases(config, {"a": (8, 8)}, 14)
    # Updates after 7 and 11.
    assert [(p.start, p.event) for p in found] == [
        (0, "start"), (3, "conversion"), (5, "bases"), (7, "update"), (9, "bases"), (11, "update"), (12, "bases")
    ]  # fmt: skip
    trained = [t for p in found if p.trained for t in range(p.start, p.start + p.steps)]
    assert trained == [t for t in range(3, 14) if config.trains_bases(t)]
    assert sum(p.steps for p in found) == 14


def test_shares_of_the_run():
    steps = OIALRConfig(delay=5, frequency=2, rule=FixedFraction(0.5), bases_trained=[(14, None)])
    shares = OIALRConfig(delay=0.25, frequency=0.1, rule=FixedFraction(0.5), bases_trained=[(0.7, None)])
    assert phases(shares, {"a": (8, 8)}, 20) == phases(steps, {"a": (8, 8)}, 20)


def test_what_events_work_on():
    config = OIALRConfig(delay=2, frequency=2, rule=FixedFraction(0.5), layer_share_step=0.5)
    shapes = {"a": (8, 8), "b": (8, 4)}
    found = [(p.event, dict(p.before), dict(p.r)) for p in phases(config, shapes, 6)]
    assert found == [
        ("start", {}, {}),
        ("conversion", {"a": 8, "b": 4}, {"a": 8, "b": 4}),
        ("update", {"b": 4}, {"a": 8, "b": 2}),
        ("update", {"a": 8, "b": 2}, {"a": 4, "b": 2}),
    ]


def test_a_dense_run_has_one_phase():
    (phase,) = phases(None, [], 7)
    assert (phase.steps, phase.event, phase.r) == (7, "start", {})


def test_rules_that_look_at_values_are_replaced_and_it_is_said():
    assert predictable_rule(FixedFraction(0.3), 0.25) == (FixedFraction(0.3), None)
    rule, assumption = predictable_rule(RelativeCutoff(0.2), 0.125)
    assert rule == FixedFraction(0.125)
    assert assumption == (
        "RelativeCutoff(beta=0.2) depends on singular values, which are not known before the run: r falls to 0.125 k, "
        "within the recipe's limits (--r-fraction)"
    )


def test_a_budget_is_taken_to_be_divided_evenly():
    """Two layers of 8 x 8: r = 4 has a quarter of the weights' numbers."""
    rule, assumption = predictable_rule(Budget(parameters=0.25), 0.125, [(8, 8), (8, 8)])
    assert rule == FixedFraction(0.5)
    assert assumption is not None
    assert assumption.endswith("which are not known before the run: each layer keeps 0.5 k")
    assert predictable_rule(Budget(parameters=0.25), 0.125)[0] == FixedFraction(0.125)
