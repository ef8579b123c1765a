"""Edges and predictions of random-matrix theory, against tables, another form of the formulas, and simulation."""

from __future__ import annotations

import math

import pytest
import torch

from hpc_oialr import MultilinearNoiseEdge, mlsvd, predicted_alignment, predicted_eigenvalue
from hpc_oialr.errors import ConfigError
from hpc_oialr.linalg.noise_spectra import detection_threshold, noise_level, tracy_widom_quantile, unfolded_shapes


@pytest.mark.parametrize(("level", "quantile"), [(0.1, 0.4501), (0.05, 0.9793), (0.01, 2.0234)])
def test_tracy_widom_quantiles_are_those_of_the_tables(level: float, quantile: float) -> None:
    """The law itself has no closed form."""
    assert tracy_widom_quantile(level) == pytest.approx(quantile, abs=0.01)


@pytest.mark.parametrize(("m", "n"), [(20, 400), (400, 20), (30, 30)])
def test_noise_exceeds_the_edge_as_often_as_the_level_says(m: int, n: int) -> None:
    A = 3 * torch.randn(800, m, n, generator=torch.Generator().manual_seed(0))
    largest = torch.linalg.matrix_norm(A, 2)
    share = float((largest > MultilinearNoiseEdge(level=0.1).edge(m, n, noise=3.0)).float().mean())
    assert share == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("rho", [1.2, 1.5, 3.0])
@pytest.mark.parametrize(("m", "n"), [(160, 48_000), (30, 40), (40, 30)])
def test_predictions_are_those_of_the_spiked_rectangular_matrix(rho: float, m: int, n: int) -> None:
    c, theta = m / n, (rho * (m / n) ** 0.5) ** 0.5
    eigenvalue = (1 + theta**2) * (c + theta**2) / theta**2
    assert predicted_eigenvalue(rho, c) == pytest.approx((eigenvalue - 1) / c**0.5)
    alignment = 1 - c * (1 + theta**2) / (theta**2 * (theta**2 + c))
    assert predicted_alignment(rho, c) == pytest.approx(alignment)


def test_predictions_meet_simulated_spikes() -> None:
    shape, rho, noise, seeds = (40, 50, 60), 3.0, 0.2, 16
    s = rho**0.5 * detection_threshold(shape, noise)
    eigenvalues, alignments, levels = torch.zeros(3, seeds), torch.zeros(3, seeds), []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        vectors = [torch.nn.functional.normalize(torch.randn(n, generator=generator), dim=0) for n in shape]
        T = s * torch.einsum("i,j,k->ijk", *vectors) + noise * torch.randn(shape, generator=generator)
        found = mlsvd(T, (1, 1, 1))
        levels.append(noise_level(found.spectra, shape))
        for mode, (m, n) in enumerate(unfolded_shapes(shape)):
            eigenvalues[mode, seed] = (found.spectra[mode][0] ** 2 / (noise**2 * n) - 1) / (m / n) ** 0.5
            alignments[mode, seed] = (found.bases[mode][:, 0] @ vectors[mode]) ** 2
    assert levels == pytest.approx([noise] * seeds, rel=0.01)
    for mode, (m, n) in enumerate(unfolded_shapes(shape)):
        assert float(eigenvalues[mode].mean()) == pytest.approx(predicted_eigenvalue(rho, m / n), abs=0.15)
        assert float(alignments[mode].mean()) == pytest.approx(predicted_alignment(rho, m / n), abs=0.02)


def test_modes_that_disagree_get_no_more_than_the_product_of_the_others() -> None:
    strong, weak = torch.tensor([99.0, 98.0, 1.0, 1.0]), torch.tensor([99.0, 1.0, 1.0, 1.0])
    rule, shape = MultilinearNoiseEdge(noise=1.0), (4, 4, 4)
    assert rule.choose([strong, weak, weak], shape) == (1, 1, 1)
    assert rule.choose([strong, strong, weak], shape) == (2, 2, 1)
    assert rule.choose([strong, strong, torch.ones(4)], shape) == (0, 0, 0)


def test_refuses_values_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"level is 0\.5; must lie in \(0, 0\.5\)"):
        MultilinearNoiseEdge(level=0.5)
    with pytest.raises(ConfigError, match="noise is 0"):
        MultilinearNoiseEdge(noise=0.0)
    with pytest.raises(ConfigError, match="rho is -1"):
        predicted_alignment(-1.0)
    with pytest.raises(ConfigError, match="c is nan"):
        predicted_eigenvalue(2.0, math.nan)
    with pytest.raises(ConfigError, match=r"spectra is 1; must be one a mode of a tensor of shape \(4, 5\)"):
        MultilinearNoiseEdge().choose([torch.ones(4)], (4, 5))
