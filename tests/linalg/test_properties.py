"""Any shape, any split, any number of threads: the factorisations hold, and every message is received."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.svd_cases import best_error, errors
from support.threads import run_threads

from hpc_oialr.linalg.distributed_svd import fewest, hierarchical_svd, randomized_svd
from hpc_oialr.linalg.row_partition import frobenius_norm
from hpc_oialr.linalg.tsqr import BlockSVD, gathered_svd, tsqr, tsqr_svd

splits = st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(lambda rows: sum(rows) > 0)
widths = st.integers(1, 15)
seeds = st.integers(0, 99)
many = settings(max_examples=60, deadline=None)


def random(rows: list[int], n: int, seed: int, r: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(sum(rows), n, dtype=torch.float64, generator=generator)
    r = n if r is None else min(r, n)
    return A if r == n else A[:, :r] @ torch.randn(r, n, dtype=torch.float64, generator=generator)


def joined(results: list[BlockSVD]) -> BlockSVD:
    first = results[0]
    assert all(torch.equal(other.s, first.s) and torch.equal(other.Vh, first.Vh) for other in results)
    return first._replace(U=torch.cat([result.U for result in results]))


@many
@given(rows=splits, n=widths, seed=seeds, r=st.sampled_from([None, 1, 2]))
def test_exact_svd(rows: list[int], n: int, seed: int, r: int | None) -> None:
    A = random(rows, n, seed, r)
    for method in (tsqr_svd, gathered_svd):
        found = joined(run_threads(len(rows), lambda c, f=method: f(A.split(rows)[c.rank], c)))
        assert found.U.shape == (sum(rows), min(A.shape))
        assert max(errors(A, *found[:3])) < 1e-13


@many
@given(rows=splits, n=widths, seed=seeds)
def test_qr(rows: list[int], n: int, seed: int) -> None:
    A = random(rows, n, seed)
    parts = run_threads(len(rows), lambda c: tsqr(A.split(rows)[c.rank], c))
    Q, R = torch.cat([part.Q for part in parts]), parts[0].R
    assert all(torch.equal(part.R, R) for part in parts)
    assert torch.equal(R, R.triu())
    torch.testing.assert_close(Q @ R, A, rtol=0, atol=1e-12)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(Q.shape[1], dtype=torch.float64), rtol=0, atol=1e-13)


@many
@given(rows=splits, n=widths, seed=seeds, r=st.integers(1, 5), shift=st.integers(0, 3))
def test_hierarchical_error_is_the_true_one(rows: list[int], n: int, seed: int, r: int, shift: int) -> None:
    A = random(rows, n, seed)
    found = joined(run_threads(len(rows), lambda c: hierarchical_svd(A.split(rows)[c.rank], c, r=r, shift=shift)))
    true = float(torch.linalg.matrix_norm(A - (found.U * found.s) @ found.Vh))
    assert found.error == pytest.approx(true, rel=1e-10, abs=1e-12)
    # The reference's bound with q = 3 levels; far from tight.
    assert true <= ((1 + 2**0.5) ** 4 - 1) * best_error(A, r) + 1e-12


@many
@given(rows=splits, n=widths, seed=seeds, tolerance=st.floats(0, 0.99))
def test_hierarchical_keeps_the_tolerance(rows: list[int], n: int, seed: int, tolerance: float) -> None:
    A = random(rows, n, seed)
    found = joined(run_threads(len(rows), lambda c: hierarchical_svd(A.split(rows)[c.rank], c, tolerance=tolerance)))
    true, norm = float(torch.linalg.matrix_norm(A - (found.U * found.s) @ found.Vh)), frobenius_norm(A)
    assert true <= tolerance * norm + 1e-12 * norm
    assert found.error == pytest.approx(true, rel=1e-10, abs=1e-12)
    if len(rows) == 1:
        assert len(found.s) == fewest(torch.linalg.svdvals(A), (tolerance * norm) ** 2 * (1 + 1e-14))


@settings(max_examples=25, deadline=None)
@given(rows=splits, n=widths, seed=seeds, r=st.integers(1, 3))
def test_randomized_finds_low_rank_exactly(rows: list[int], n: int, seed: int, r: int) -> None:
    A = random(rows, n, seed, r)
    found = joined(run_threads(len(rows), lambda c: randomized_svd(A.split(rows)[c.rank], c, r=r)))
    norm = frobenius_norm(A)
    assert float(torch.linalg.matrix_norm(A - (found.U * found.s) @ found.Vh)) < 1e-12 * norm
    assert found.error < 1e-6 * norm
    alone = randomized_svd(A, r=r)
    torch.testing.assert_close(found.s, alone.s, rtol=0, atol=1e-12 * norm)


@many
@given(rows=splits, n=widths, seed=seeds)
def test_norms(rows: list[int], n: int, seed: int) -> None:
    A = random(rows, n, seed)

    for frobenius in run_threads(len(rows), lambda c: frobenius_norm(A.split(rows)[c.rank], c)):
        assert frobenius == pytest.approx(float(torch.linalg.matrix_norm(A)), rel=1e-13)
