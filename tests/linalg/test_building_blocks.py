"""Blocked QR, the random sketch, shapes agreed on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.threads import outcomes, run_threads

from hpc_oialr.linalg import tsqr
from hpc_oialr.linalg.communicator import Communicator
from hpc_oialr.linalg.distributed_svd import gaussian
from hpc_oialr.linalg.row_partition import agree, block_of, even_blocks, transpose_blocks
from hpc_oialr.linalg.svd import SVD, svd
from hpc_oialr.linalg.tsqr import blocked_qr


@pytest.mark.parametrize("m", [8, 63, 64, 65, 300, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocked_qr_is_as_good_as_lapack(monkeypatch: pytest.MonkeyPatch, m: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(tsqr, "BLOCK_VALUES", 1)
    A = (torch.randn(m, 8, dtype=torch.float64) * torch.logspace(0, -12, 8, dtype=torch.float64)).to(dtype)
    eps = torch.finfo(dtype).eps
    apply, R = blocked_qr(A)
    Q = apply(torch.eye(8, dtype=dtype))
    assert torch.equal(R, R.triu())
    columns = torch.linalg.vector_norm(A, dim=0)
    assert ((Q @ R - A).norm(dim=0) / columns).max() < 20 * eps
    assert (Q.mT @ Q - torch.eye(8, dtype=dtype)).norm() < 20 * eps


def test_every_process_draws_the_same_sketch_whatever_its_threads() -> None:
    threads = torch.get_num_threads()
    G = gaussian(3000, 40, seed=5)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(G, found) for found in run_threads(3, lambda c: gaussian(3000, 40, 5)))
    finally:
        torch.set_num_threads(threads)
    assert abs(float((G * gaussian(3000, 40, seed=6)).mean())) < 5 / G.numel() ** 0.5
    assert abs(float(G.square().mean()) - 1) < 5 * (2 / G.numel()) ** 0.5


@given(st.integers(0, 50), st.integers(1, 9))
def test_even_blocks(length: int, parts: int) -> None:
    sizes = even_blocks(length, parts)
    assert sum(sizes) == length
    assert max(sizes) - min(sizes) <= 1
    rows = [i for p in range(parts) for i in range(length)[block_of(length, parts, p)]]
    assert rows == list(range(length))


@pytest.mark.parametrize("rows", [[3], [2, 0, 5], [1, 1, 1, 1]])
def test_transpose_of_blocks(rows: list[int]) -> None:
    A = torch.randn(sum(rows), 7)

    def transposed(c):  # type: ignore[no-untyped-def]
        mine, partition = agree(A.split(rows)[c.rank], c, "A")
        assert partition.rows == tuple(rows)
        assert torch.equal(A[partition.span(c.rank)], mine)
        return transpose_blocks(mine, c, partition)

    assert torch.equal(torch.cat(run_threads(len(rows), transposed)), A.mT)


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (torch.ones(3), "ConfigError: W is '1-d'; must have 2 dimensions on every rank; rank 1's"),
        (torch.ones(2, 2, dtype=torch.int64), "ConfigError: W.dtype is 'other'; must be float64, float32"),
        (torch.ones(2, 3), "WorldError: the blocks of W have widths 2 (rank 0), 3 (rank 1); must be"),
        (torch.ones(2, 2).double(), "WorldError: the blocks of W have dtypes torch.float32 (rank 0)"),
        (torch.ones(2, 2) / 0, "NonFiniteError: W holds 4 NaN or Inf among 8 values (4 on rank 1)"),
    ],
)
def test_all_processes_tell_what_one_did_wrong(bad: torch.Tensor, expected: str) -> None:
    told = outcomes(2, lambda c: agree(bad if c.rank else torch.ones(2, 2), c, "W"))
    assert len(set(told)) == 1
    assert told[0].startswith(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_are_cast_up(dtype: torch.dtype) -> None:
    A, _ = agree(torch.ones(2, 2, dtype=dtype), Communicator(), "A")
    assert A.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_value_far_below_rounding_slows_an_svd(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Columns that shrink by 40 orders of magnitude: what is zeroed is without effect on a singular value."""
    drawn = torch.randn(90, 60, dtype=dtype, generator=torch.Generator().manual_seed(0))
    A = drawn * torch.logspace(0, -40, 60, dtype=torch.float64).to(dtype)
    factors: list[torch.Tensor] = []

    def recorded(R: torch.Tensor, *, name: str) -> SVD:
        factors.append(R)
        return svd(R, name=name)

    monkeypatch.setattr(tsqr, "svd", recorded)
    found, eps = tsqr.tsqr_svd(A), torch.finfo(dtype).eps
    kept = factors[0][factors[0] != 0].abs()
    assert kept.min() >= eps**2 * kept.max()
    assert len(kept) < 60 * 61 / 2, "something was zeroed"
    assert (found.s - svd(A).s).abs().max() < 10 * eps * found.s[0]
    assert (A - (found.U * found.s) @ found.Vh).norm() < 20 * eps * A.norm()
