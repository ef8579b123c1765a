"""Schroedinger operators by exact states, the networks' Laplacian by torch's, and a short training."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hpc_oialr.operators.schroedinger import distance, harmonic_oscillator, hydrogen, jet
from hpc_oialr.operators.training import Settings, evaluate, generator_of, train

OSCILLATOR, HYDROGEN = harmonic_oscillator(), hydrogen()
STATES = [
    (OSCILLATOR, 0, lambda x: torch.exp(-OSCILLATOR.envelope(x))),
    (OSCILLATOR, 3, lambda x: x[:, :1] * x[:, 1:] * torch.exp(-OSCILLATOR.envelope(x))),
    (HYDROGEN, 0, lambda x: torch.exp(-2 * distance(x))),
    (HYDROGEN, 1, lambda x: x[:, :1] * torch.exp(-2 / 3 * distance(x))),
    (HYDROGEN, 4, lambda x: (x[:, :1] ** 2 - x[:, 1:] ** 2) * torch.exp(-2 / 5 * distance(x))),
]


@pytest.mark.parametrize(("problem", "number", "state"), STATES)
def test_exact_states_and_energies(problem, number, state) -> None:
    x, weight = problem.points(4096, generator_of(0, 0))
    values = state(x)
    applied = problem.potential(x)[:, None] * values - jet(state, x)[-1] / 2
    energy = problem.exact(number + 1)[number]
    torch.testing.assert_close(applied, energy * values, rtol=1e-6, atol=1e-9)
    # Points and weights: |state|^2 and its product with H are integrated right.
    norm, product = ((weight[:, None] * values * each).sum() for each in (values, applied))
    assert product / norm == pytest.approx(energy, rel=1e-6)
    if number == 0:
        assert float(norm) == pytest.approx(math.pi if problem is OSCILLATOR else math.pi / 8, rel=1e-3)


@pytest.mark.parametrize("problem", [OSCILLATOR, HYDROGEN])
def test_the_laplacian_of_networks_is_autograds(problem) -> None:
    torch.manual_seed(0)
    model = problem.functions(3).double()
    x, _ = problem.points(9, generator_of(0, 0))
    torch.testing.assert_close(model.laplacian(x), jet(model, x)[-1], rtol=1e-9, atol=1e-9)


def test_a_short_training_finds_the_first_states() -> None:
    problem, settings = replace(OSCILLATOR, width=32, depth=2), Settings(functions=3, batch=96, steps=250, lr=0.01)
    found = problem.spectrum(evaluate(problem, train(problem, settings).model, settings, batch=4096))
    torch.testing.assert_close(torch.tensor(found), torch.tensor([1.0, 2.0, 2.0]), rtol=0.03, atol=0)
