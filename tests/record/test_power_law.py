"""The tail's exponent against powerlaw and WeightWatcher, the edge against the law's integral."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize

from hpc_oialr.record.quantities import FEWEST, bulk_edge, power_law_exponent, spectral_quantities

# alpha of WeightWatcher 0.7.7 (WW_powerlaw.pl_fit(s^2), its default) of matrices(): seed, shape, heavy tail.
WEIGHTWATCHER = {
    (0, (64, 32), False): 3.377076965325202,
    (1, (64, 32), True): 3.28950182198026,
    (2, (300, 100), False): 7.039120944302963,
    (3, (300, 100), True): 3.3611473884656573,
    (4, (512, 256), True): 4.488993131103915,
}


def singular_values(seed: int, shape: tuple[int, int], heavy: bool) -> np.ndarray:
    generator = np.random.default_rng(seed)
    W = generator.standard_t(2.5, shape) if heavy else generator.standard_normal(shape)
    return np.linalg.svd(W, compute_uv=False)


@pytest.mark.parametrize("case", WEIGHTWATCHER)
def test_weightwatchers_alpha(case: tuple[int, tuple[int, int], bool]) -> None:
    s = singular_values(*case)
    assert power_law_exponent(s) == pytest.approx(WEIGHTWATCHER[case], rel=1e-9)
    # In the record values are float32.
    assert power_law_exponent(s.astype(np.float32)) == pytest.approx(WEIGHTWATCHER[case], rel=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [(0, (64, 32), False), (1, (64, 32), True)])
def test_the_package_powerlaw(case: tuple[int, tuple[int, int], bool]) -> None:
    powerlaw = pytest.importorskip("powerlaw")
    s = singular_values(*case)
    # Version 2 would look for an exponent up to 3 only.
    fit = powerlaw.Fit(s**2, verbose=False, parameter_ranges={"alpha": (1, None)})
    assert power_law_exponent(s) == pytest.approx(fit.power_law.alpha, rel=1e-9)


def test_does_not_depend_on_scale_order_or_zeros() -> None:
    s = singular_values(1, (64, 32), True)
    alpha = power_law_exponent(s)
    assert power_law_exponent(1e-6 * s[::-1]) == pytest.approx(alpha, rel=1e-9)
    assert power_law_exponent(np.append(s, [1e-9, 0])) == alpha


@pytest.mark.parametrize("s", [np.zeros(50), np.ones(50), np.arange(1.0, FEWEST), np.array([])])
def test_no_tail_to_speak_of(s: np.ndarray) -> None:
    assert math.isnan(power_law_exponent(s))


def test_is_in_the_record() -> None:
    s = singular_values(1, (64, 32), True).astype(np.float32)
    assert spectral_quantities(s, 64, 32)["alpha"] == pytest.approx(WEIGHTWATCHER[1, (64, 32), True], rel=1e-4)


@pytest.mark.parametrize(("m", "n"), [(40, 40), (90, 30), (30, 900)])
def test_edge_by_the_formulas(m: int, n: int) -> None:
    """sigma = median / sqrt(long mu), mu the median of the Marchenko-Pastur law (Gavish & Donoho)."""
    c = min(m, n) / max(m, n)
    low, high = (1 - math.sqrt(c)) ** 2, (1 + math.sqrt(c)) ** 2

    def mass(x: float) -> float:
        density = lambda t: math.sqrt((high - t) * (t - low)) / (2 * math.pi * c * t)  # noqa: E731
        return float(scipy.integrate.quad(density, low, x)[0])

    mu = scipy.optimize.brentq(lambda x: mass(x) - 0.5, low + 1e-9, high - 1e-9)
    s = np.linspace(3, 1, min(m, n))
    median = s[(min(m, n) - 1) // 2]
    expected = median / math.sqrt(max(m, n) * mu) * (math.sqrt(m) + math.sqrt(n))
    assert bulk_edge(s, m, n) == pytest.approx(expected, rel=1e-4)
