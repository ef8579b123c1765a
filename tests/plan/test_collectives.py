"""Times of collectives against the textbook, and fits against what was put in."""

from __future__ import annotations

import numpy as np
import pytest

from hpc_oialr.plan.collectives import ALGORITHMS, FITTED, Link, Sample, fit, mean_error, seconds

LINK = Link(alpha_s=2e-6, beta_s_per_byte=1e-9)


@pytest.mark.parametrize(
    ("collective", "algorithm", "expected"),
    [
        # P = 8, n = 10^6 bytes: Thakur et al. 2005, sections 4.1 to 4.5.
        ("all_reduce", "ring", 14 * 2e-6 + 2 * 7 / 8 * 1e-3),
        ("all_reduce", "tree", 6 * 2e-6 + 2 * 1e-3),
        ("all_gather", "ring", 7 * 2e-6 + 7 / 8 * 1e-3),
        ("reduce_scatter", "ring", 7 * 2e-6 + 7 / 8 * 1e-3),
        ("all_to_all", "pairwise", 7 * 2e-6 + 7 / 8 * 1e-3),
        ("broadcast", "binomial", 3 * (2e-6 + 1e-3)),
        ("broadcast", "scatter and all-gather", 10 * 2e-6 + 2 * 7 / 8 * 1e-3),
    ],
)
def test_textbook(collective, algorithm, expected):
    assert seconds(collective, LINK, 8, 1e6, algorithms=[algorithm]) == pytest.approx(expected)


def test_one_process_sends_nothing():
    assert all(seconds(name, LINK, 1, 1e6) == 0 for name in ALGORITHMS)


def test_the_fastest_algorithm_is_taken():
    """Small messages by the tree, large ones in the ring."""
    tree, ring = (
        lambda n, name=name: seconds("all_reduce", LINK, 64, n, algorithms=[name])
        for name in ("tree", "ring")
    )
    assert seconds("all_reduce", LINK, 64, 4) == tree(4) < ring(4)
    assert seconds("all_reduce", LINK, 64, 1e9) == ring(1e9) < tree(1e9)


@pytest.mark.parametrize("collective", list(FITTED))
def test_a_fit_finds_what_was_put_in(collective):
    true = Link(3e-5, 2e-9)
    samples = [
        Sample(p, n, seconds(collective, true, p, n, algorithms=[FITTED[collective]]))
        for p in (2, 4, 16)
        for n in (4, 1e3, 1e5, 1e7)
    ]
    found = fit(collective, samples, FITTED[collective])
    assert found.alpha_s == pytest.approx(true.alpha_s)
    assert found.beta_s_per_byte == pytest.approx(true.beta_s_per_byte)
    assert mean_error(collective, found, samples, FITTED[collective]) < 1e-9


def test_a_fit_of_noisy_times():
    random, true = np.random.default_rng(0), Link(1e-4, 1e-9)
    samples = [
        Sample(2, n, seconds("all_reduce", true, 2, n) * random.uniform(0.9, 1.1))
        for n in (4, 1e3, 1e5, 1e6, 1e7)
        for _ in range(20)
    ]
    found = fit("all_reduce", samples, "ring")
    assert found.alpha_s == pytest.approx(true.alpha_s, rel=0.03)
    assert found.beta_s_per_byte == pytest.approx(true.beta_s_per_byte, rel=0.03)
    assert 0.02 < mean_error("all_reduce", found, samples, "ring") < 0.1


def test_neither_part_of_a_fit_is_negative():
    falling = [Sample(2, n, t) for n, t in ((4, 3e-4), (1e6, 2e-4))]
    found = fit("all_reduce", falling, "ring")
    assert found.beta_s_per_byte == 0.0
    assert 1e-4 < found.alpha_s < 1.5e-4
    steep = [Sample(2, n, t) for n, t in ((1e3, 1e-7), (1e6, 1e-2))]
    assert fit("all_reduce", steep, "ring").alpha_s == 0.0
