"""Which method distributed_svd takes, what settings are refused, and what happens when one rank fails."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from support.svd_cases import best_error, spectrum, with_spectrum
from support.threads import outcomes, run_threads

from hpc_oialr.errors import ConfigError, NonFiniteError
from hpc_oialr.linalg import distributed_svd as module
from hpc_oialr.linalg import tsqr
from hpc_oialr.linalg.distributed_svd import distributed_svd, hierarchical_svd, randomized_svd

METHODS = ("tsqr_svd", "gathered_svd", "hierarchical_svd", "randomized_svd")


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    ("m", "n", "target", "method"),
    [
        (60, 12, {}, "tsqr_svd"),
        (12, 60, {}, "tsqr_svd"),
        (48, 48, {}, "gathered_svd"),
        (60, 12, {"r": 3}, "tsqr_svd"),
        (48, 48, {"r": 3}, "gathered_svd"),
        (60, 60, {"r": 5}, "randomized_svd"),
        (60, 12, {"tolerance": 0.2}, "hierarchical_svd"),
        (12, 60, {"tolerance": 0.2}, "hierarchical_svd"),
    ],
)
def test_the_method_that_suits(
    monkeypatch: pytest.MonkeyPatch, size: int, m: int, n: int, target: dict[str, Any], method: str
) -> None:
    called = {name: mock.Mock(wraps=getattr(module, name)) for name in METHODS}
    for name, function in called.items():
        monkeypatch.setattr(module, name, function)
    k = min(m, n)
    A = with_spectrum(m, n, spectrum("falling", k))
    parts = A.tensor_split(size)
    found = run_threads(size, lambda c: distributed_svd(parts[c.rank], c, **target))
    assert called[method].call_count == size
    U, (_, s, Vh, error) = torch.cat([part.U for part in found]), found[0]
    true = float(torch.linalg.matrix_norm(A - (U * s) @ Vh))
    assert true == pytest.approx(error, abs=1e-6)
    if "r" in target:
        assert len(s) == target["r"]
        assert true <= best_error(A, len(s)) * 1.02
    elif target:
        assert true <= 0.2 * float(torch.linalg.matrix_norm(A)) < best_error(A, len(s) - 2)
    else:
        assert (len(s), error) == (k, 0.0)


A = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: distributed_svd(A, r=0), "r is 0; must be at least 1. It counts singular values."),
        (lambda: distributed_svd(A, r=1, tolerance=0.1), "target is 'r = 1, tolerance = 0.1'; exactly one"),
        (lambda: hierarchical_svd(A), "target is 'r = None, tolerance = None'; exactly one of r and"),
        (
            lambda: hierarchical_svd(A, tolerance=1.5),
            "tolerance is 1.5; must lie in [0, 1). It is relative to ||A||",
        ),
        (lambda: hierarchical_svd(A, r=2, shift=-1), "shift is -1; must be 0 or more. 10 is the default."),
        (lambda: randomized_svd(A, r=0), "r is 0; must be at least 1."),
        (lambda: randomized_svd(A, r=1, oversampling=-2), "oversampling is -2; must be at least 0."),
        (lambda: randomized_svd(A, r=1, power_iterations=-1), "power_iterations is -1; must be at least 0."),
    ],
)
def test_settings_out_of_range(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("failing", [0, 1, 3])
def test_one_rank_without_convergence_stops_all(monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """A leaf's SVD fails (hierarchical), or the root's (TSQR); no rank waits for ever."""
    original = tsqr.svd

    def fails(A: torch.Tensor, *, name: str) -> object:
        if bool((A.max() == A).any()) and float(A.abs().max()) > 100:
            raise NonFiniteError("did not converge")
        return original(A, name=name)

    for each in (tsqr, module):
        monkeypatch.setattr(each, "svd", fails)
    blocks = [torch.randn(6, 4) * (1000 if rank == failing else 1) for rank in range(4)]
    for target in ({}, {"tolerance": 0.0}):
        told = outcomes(4, lambda c, t=target: distributed_svd(blocks[c.rank], c, name="fc1", **t))
        assert len(set(told)) == 1
        assert told[0].startswith("NonFiniteError: no factorization of fc1 converged on one of 4 ranks")
