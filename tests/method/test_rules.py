"""Rules for r, limits, and the noise edge."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from hpc_oialr import (
    OIALR,
    CumulativeSum,
    Energy,
    FixedFraction,
    NoiseEdge,
    OIALRConfig,
    RankLimits,
    RelativeCutoff,
    StableRank,
)
from hpc_oialr.errors import ConfigError
from hpc_oialr.linalg.noise_spectra import marchenko_pastur_median, noise_edge
from hpc_oialr.method.rules import Budget, RankRule, Spectrum

SPECTRUM = torch.tensor([10.0, 5.0, 4.0, 1.0, 0.5, 0.1])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (RelativeCutoff(0.1), 4),
        (RelativeCutoff(0.45), 2),
        (CumulativeSum(0.7), 2),
        (CumulativeSum(1.0), 6),
        (Energy(0.7), 1),
        (Energy(0.8), 2),
        (StableRank(2.0), 3),
        (FixedFraction(0.5), 4),
    ],
)
def test_rules_by_hand(rule: RelativeCutoff, expected: int) -> None:
    assert rule.choose(SPECTRUM, 20, 8) == expected


NO_LIMITS = RankLimits(round_to=1, min_fraction=0.0)
STEEP, FLAT = torch.tensor([2.0, 1.0, 1.0, 0.0]), torch.ones(4)


def test_a_budget_of_parameters_by_hand() -> None:
    """From r = 4 on a core saves 7, 5 and 3 numbers; the steep layer's directions have 0, 1/6, 1/6 of its energy."""
    layers = [Spectrum(STEEP, 4, 4), Spectrum(FLAT, 4, 4)]
    # Losses over savings: 0, .033, .056 and .036, .05, .083.
    found = {share: Budget(parameters=share).choose_all(layers, NO_LIMITS) for share in (1.0, 0.75, 0.6, 0.5, 0.4, 0.2)}
    assert found == {1.0: [4, 4], 0.75: [2, 4], 0.6: [2, 3], 0.5: [2, 3], 0.4: [2, 2], 0.2: [1, 2]}
    for share, rs in found.items():
        assert sum(r * r for r in rs) <= share * 32
    # Neither scale nor order count. Trained bases: 48, 33, 20, 9 numbers for r = 4 to 1.
    assert Budget(parameters=0.5).choose_all([Spectrum(100 * FLAT, 4, 4), layers[0]], NO_LIMITS) == [3, 2]
    trained = [replace(layer, bases_trained=True) for layer in layers]
    assert Budget(parameters=1.0).choose_all(trained, NO_LIMITS) == [1, 2]


def test_a_budget_of_operations_by_hand() -> None:
    """8 tokens, 4 x 4: dense 384 multiply-adds; r = 4 to 1: 768, 528, 320, 144, by 128 r + 16 r^2."""
    one = Spectrum(FLAT, 4, 4, tokens=8)
    shares = (1.0, 0.9, 0.8, 0.375, 0.1)
    assert [Budget(operations=share).choose_all([one], NO_LIMITS)[0] for share in shares] == [2, 2, 1, 1, 1]
    # A layer that sees ten times the tokens costs ten times as much, and goes first.
    often = replace(one, tokens=80)
    few, many = Budget(operations=0.85).choose_all([one, often], NO_LIMITS)
    assert (few, many) == (4, 1)
    # Trained bases: 8 r (8 + 2 r) more.
    trained = replace(one, bases_trained=True)
    assert Budget(operations=0.6).choose_all([trained], NO_LIMITS) == [1]
    assert Budget(operations=0.5).choose_all([replace(trained, s=FLAT[:1])], NO_LIMITS) == [1], "no less than 1"


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 1000), share=st.floats(0.01, 1.0), multiple=st.sampled_from([1, 4, 8]))
def test_no_choice_within_a_budget_loses_less(seed: int, share: float, multiple: int) -> None:
    """Against all choices for three layers; the last multiple may be more than was needed."""
    generator = torch.Generator().manual_seed(seed)
    limits = RankLimits(round_to=multiple, min_fraction=0.0)
    layers = []
    for m, n in ((12, 9), (8, 8), (16, 5)):
        s = torch.rand(min(m, n), generator=generator, dtype=torch.float64).square().sort(descending=True).values
        layers.append(Spectrum(s, m, n, tokens=int(torch.randint(1, 50, (1,), generator=generator))))
    rule = Budget(parameters=share)
    paths = [limits.path(len(each.s), min(each.m, each.n)) for each in layers]

    def cost(rs: Sequence[int]) -> int:
        return sum(r * r for r in rs)

    def lost(rs: Sequence[int]) -> float:
        return sum(float(each.s[r:].square().sum() / each.s.square().sum()) for each, r in zip(layers, rs, strict=True))

    found = rule.choose_all(layers, limits)
    budget = share * sum(each.m * each.n for each in layers)
    least = [path[-1] for path in paths]
    assert cost(found) <= budget or found == least
    assert all(r in path for r, path in zip(found, paths, strict=True))
    others = [rs for rs in itertools.product(*paths) if cost(rs) <= cost(found)]
    assert lost(found) <= min(map(lost, others)) + 1e-12


@pytest.mark.parametrize(("shapes", "trained"), [([(8, 8), (24, 8)], False), ([(16, 4)], True)])
@pytest.mark.parametrize("budget", [{"parameters": 0.1}, {"operations": 0.3}])
def test_the_even_share_uses_up_a_budget(
    shapes: list[tuple[int, int]], trained: bool, budget: dict[str, float]
) -> None:
    rule = Budget(**budget)
    share = rule.even_share(shapes, bases_trained=trained)
    assert 0 < share < 1
    # As large as in a model, so that r is a number.
    many = [(1000 * m, 1000 * n) for m, n in shapes]
    layers = [Spectrum(torch.ones(min(shape)), *shape, bases_trained=trained) for shape in many]
    spent = sum(rule._cost(layer, round(share * len(layer.s))) for layer in layers)
    assert spent / sum(map(rule._dense, layers)) == pytest.approx(*budget.values(), rel=2e-3)


@pytest.mark.parametrize(
    ("rule", "least"),
    [(RelativeCutoff(0.5), 1), (Energy(0.5), 1), (Budget(parameters=0.1), 1), (FixedFraction(0.3), 3)],
)
def test_the_least_that_a_rule_keeps(rule: RankRule, least: int) -> None:
    assert rule.least(20, 8) == least
    one = torch.zeros(8)
    one[0] = 1.0
    assert rule.choose(one, 20, 8) >= least


@pytest.mark.parametrize("shape", [(400, 400), (600, 200), (100, 800)])
def test_noise_edge_keeps_the_planted_signal_only(shape: tuple[int, int]) -> None:
    m, n = shape
    generator = torch.Generator().manual_seed(0)
    noise = 0.3 * torch.randn(m, n, generator=generator)
    U = torch.linalg.qr(torch.randn(m, 7, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(n, 7, generator=generator)).Q
    signal = U @ torch.diag(torch.linspace(2, 4, 7) * 0.3 * (m**0.5 + n**0.5)) @ V.mT
    assert NoiseEdge().choose(torch.linalg.svdvals(noise + signal), m, n) == 7


def test_noise_edge_needs_the_bulk() -> None:
    s = torch.linspace(2, 1, 30)
    assert NoiseEdge().choose(s, 100, 100) == 30


@pytest.mark.parametrize("shape", [(500, 500), (900, 300)])
def test_marchenko_pastur_against_simulation(shape: tuple[int, int]) -> None:
    m, n = shape
    s = torch.linalg.svdvals(torch.randn(m, n, generator=torch.Generator().manual_seed(1)))
    median = float(s[min(m, n) // 2] ** 2) / max(m, n)
    assert marchenko_pastur_median(min(m, n) / max(m, n)) == pytest.approx(median, rel=0.02)
    assert noise_edge(float(s[min(m, n) // 2]), m, n) == pytest.approx(float(s[0]), rel=0.03)


@given(
    wanted=st.integers(0, 300),
    k=st.integers(1, 256),
    drop=st.floats(0.01, 1.0),
    least=st.floats(0.0, 1.0),
    multiple=st.sampled_from([1, 8, 16, "auto"]),
    data=st.data(),
)
def test_limits(
    wanted: int, k: int, drop: float, least: float, multiple: int | Literal["auto"], data: st.DataObject
) -> None:
    r = data.draw(st.integers(1, k))
    limits = RankLimits(max_drop=drop, min_fraction=least, round_to=multiple)
    new, each = limits.apply(wanted, r, k), limits.multiple(k)
    assert 1 <= new <= r
    assert new >= min(r, r * (1 - drop)) or new == (r - 1) // each * each
    assert new >= min(r, least * k)
    assert new == r or new % each == 0
    assert new >= min(wanted, r)


@given(
    wanted=st.integers(0, 2100),
    k=st.integers(1, 2048),
    drop=st.floats(0.001, 1.0),
    least=st.floats(0.0, 1.0),
    start=st.floats(0.01, 1.0),
    multiple=st.sampled_from([1, 2, 8, 64, "auto"]),
)
@example(wanted=192, k=768, drop=0.16, least=0.01, start=0.5, multiple=64)  # stood at 384
@example(wanted=16, k=64, drop=0.3, least=0.01, start=0.5, multiple=8)  # stood at 24
@settings(max_examples=200)
def test_cuts_never_stall(
    wanted: int, k: int, drop: float, least: float, start: float, multiple: int | Literal["auto"]
) -> None:
    limits = RankLimits(max_drop=drop, min_fraction=least, at_conversion=start, round_to=multiple)
    path = [limits.initial(k)]
    while len(path) < 2 or path[-1] < path[-2]:
        path.append(limits.apply(wanted, path[-1], k))
    floor, each = max(1, wanted, least * k), limits.multiple(k)
    assert path[:-1] == sorted(set(path), reverse=True)
    assert min(floor, path[0]) <= path[-1]
    assert path[-1] < floor + each


@pytest.mark.parametrize(("k", "multiple"), [(31, 1), (32, 8), (127, 8), (128, 16), (511, 16), (512, 64), (4096, 64)])
def test_automatic_multiples(k: int, multiple: int) -> None:
    assert RankLimits().multiple(k) == multiple
    assert RankLimits(round_to=5).multiple(k) == 5


def test_gradual_cuts() -> None:
    for multiple, expected in ((1, [103, 83, 67, 64]), ("auto", [112, 96, 80, 64])):
        limits, r, path = RankLimits(max_drop=0.2, at_conversion=0.5, round_to=multiple), 128, []
        assert limits.initial(256) == 128
        while r > 64:
            r = limits.apply(FixedFraction(0.25).choose(SPECTRUM, 256, 256), r, 256)
            path.append(r)
        assert path == expected


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RelativeCutoff(1.3), r"rule.beta is 1.3; must lie in \(0, 1\). The paper uses 0.1-0.2."),
        (lambda: RelativeCutoff(0.0), r"rule.beta is 0.0; must lie in \(0, 1\)"),
        (lambda: CumulativeSum(1.2), r"rule.threshold is 1.2; must lie in \(0, 1\]"),
        (lambda: Energy(0.0), r"rule.threshold is 0.0"),
        (lambda: StableRank(-1.0), r"rule.factor is -1.0; must lie in \(0, inf\)"),
        (lambda: FixedFraction(2.0), r"rule.fraction is 2.0"),
        (lambda: Budget(), "rule.operations is None; must be set, or rule.parameters"),
        (lambda: Budget(operations=0.3, parameters=0.1), "rule.operations is 0.3; cannot be set beside rule.param"),
        (lambda: Budget(parameters=1.5), r"rule.parameters is 1.5; must lie in \(0, 1\]"),
        (
            lambda: OIALRConfig(rule=Budget(operations=0.3)),
            "layer_share_step is 0.1; must be 1 with Budget, which looks at all layers",
        ),
        (
            lambda: OIALRConfig(rule=Budget(operations=0.3), layer_share_step=1.0, grow=0.1),
            "grow is 0.1; adds directions beyond what Budget allows",
        ),
        (lambda: RankLimits(max_drop=0.0), r"limits.max_drop is 0.0; must lie in \(0, 1\]"),
        (lambda: RankLimits(round_to=0), "limits.round_to is 0; must be a positive whole number, or"),
        (
            lambda: RankLimits(round_to="eight"),
            "limits.round_to is 'eight'; must be a positive whole number, or",
        ),
        (lambda: OIALRConfig(delay=-1), "delay is -1; must be a whole number of at least 0"),
        (lambda: OIALRConfig(frequency=0), "frequency is 0; must be a whole number of at least 1"),
        (lambda: OIALRConfig(layer_share_step=0.0), r"layer_share_step is 0.0; must lie in \(0, 1\]"),
        (lambda: OIALRConfig(core_lr_scale=-2.0), 'core_lr_scale is -2.0; must be positive, or "auto"'),
        (
            lambda: OIALRConfig(stability_threshold=0.9),
            "stability_threshold is 0.9; needs measurements. Set stability_freq",
        ),
        (lambda: OIALRConfig(stability_frequency=0), "stability_frequency is 0; must be a whole number of at least 1"),
        (
            lambda: OIALRConfig(delay=1.0),
            r"delay is 1.0; must be .* \(steps\), or lie between 0 and 1 \(share of the run",
        ),
        (lambda: OIALRConfig(bases_trained=[(0.7, 0.5)]), "must be pairs of times"),
        (lambda: OIALRConfig(bases_trained=[(0.7, None)]).require_steps(), "is a share of the run.*in_steps"),
        (lambda: attach(delay=0.1), "delay is 0.1; is a share of the run"),
    ],
)
def test_bad_values(make: object, text: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=text):
        make()


def attach(**settings: Any) -> OIALR:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    return OIALR(model, torch.optim.SGD(model.parameters()), OIALRConfig(**settings))


def test_times_as_shares_of_the_run() -> None:
    phases = [(0, 0.1), (0.3, 40), (0.7, None)]
    shares = OIALRConfig(delay=0.125, frequency=0.05, stability_frequency=0.01, bases_trained=phases)
    config = shares.in_steps(60)
    assert (config.delay, config.frequency, config.stability_frequency) == (8, 3, 1)
    assert config.bases_trained == [(0, 6), (18, 40), (42, None)]
    assert config.in_steps(1000) == config, "numbers of steps stay"
    # A run too short for them: at least one step between updates, and no empty phase.
    assert OIALRConfig(frequency=0.05, bases_trained=[(0.3, 0.4)]).in_steps(2).bases_trained == []
    assert OIALRConfig(frequency=0.05).in_steps(2).frequency == 1
