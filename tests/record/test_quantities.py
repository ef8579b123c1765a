"""Figures of a spectrum against the definitions, computed from the matrix by other means."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpc_oialr.method.rules import NoiseEdge
from hpc_oialr.record import quantities
from hpc_oialr.spectra.schema import EVENT

spectra = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40).map(lambda s: np.sort(np.array(s))[::-1])


@given(spectra)
def test_against_the_matrix_itself(s: np.ndarray) -> None:
    generator = np.random.default_rng(len(s))
    U, V = (np.linalg.qr(generator.standard_normal((len(s) + 3, len(s))))[0] for _ in range(2))
    W = (U * s) @ V.T
    expected = np.linalg.norm(W) ** 2 / np.linalg.norm(W, 2) ** 2
    assert quantities.stable_rank(s) == pytest.approx(expected, rel=1e-9)
    p = s / np.linalg.norm(W, "nuc")
    assert quantities.effective_rank(s) == pytest.approx(np.prod(p**-p), rel=1e-9)
    assert quantities.condition_number(s) == pytest.approx(np.linalg.cond(np.diag(s)), rel=1e-9)


def test_the_edge_of_noise_is_where_noise_ends() -> None:
    m, n, signal = 600, 200, 5
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((m, n))
    strong = 200 * np.linalg.qr(generator.standard_normal((m, signal)))[0]
    spikes = strong @ np.linalg.qr(generator.standard_normal((n, signal)))[0].T
    s = np.linalg.svd(noise + spikes, compute_uv=False)
    edge = quantities.bulk_edge(s, m, n)
    assert edge == pytest.approx(math.sqrt(m) + math.sqrt(n), rel=0.02)
    assert quantities.spectral_quantities(s, m, n)["values_above_edge"] == signal
    assert NoiseEdge().choose(torch.tensor(s), m, n) == signal


def test_no_edge_once_the_bulk_is_cut() -> None:
    s = np.array([3.0, 2.0])
    assert math.isnan(quantities.bulk_edge(s, 8, 8))
    assert math.isnan(quantities.spectral_quantities(s, 8, 8)["values_above_edge"])
    assert not math.isnan(quantities.bulk_edge(s, 8, 4))


@pytest.mark.parametrize("s", [np.zeros(3), np.array([])], ids=["zeros", "empty"])
def test_matrices_of_zeros(s: np.ndarray) -> None:
    assert quantities.stable_rank(s) == quantities.effective_rank(s) == 0
    assert math.isnan(quantities.condition_number(s))


def test_a_singular_matrix() -> None:
    s = np.array([2.0, 2.0, 0.0])
    assert quantities.condition_number(s) == math.inf
    assert quantities.effective_rank(s) == pytest.approx(2)


def test_all_are_fields_of_the_record() -> None:
    names = set(quantities.spectral_quantities(np.float32([2.0, 1.0]), 4, 2))
    assert names <= set(EVENT.names or ())
