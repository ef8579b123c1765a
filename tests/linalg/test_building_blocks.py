"""Blocked QR, Gaussian numbers by position, shapes agreed on, norms of wide matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.threads import outcomes, run_threads

from hpc_oialr.linalg import blocks, gaussian, local_qr
from hpc_oialr.linalg.blocks import spectral_norm
from hpc_oialr.linalg.gaussian import gaussian_rows
from hpc_oialr.linalg.local_qr import blocked_qr
from hpc_oialr.linalg.row_partition import agree, block_of, even_blocks, transpose_blocks


@pytest.mark.parametrize("m", [8, 63, 64, 65, 300, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocked_qr_is_as_good_as_lapack(monkeypatch: pytest.MonkeyPatch, m: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(local_qr, "BLOCK_VALUES", 1)
    A = (torch.randn(m, 8, dtype=torch.float64) * torch.logspace(0, -12, 8, dtype=torch.float64)).to(dtype)
    eps = torch.finfo(dtype).eps
    apply, R = blocked_qr(A)
    Q = apply(torch.eye(8, dtype=dtype))
    assert torch.equal(R, R.triu())
    columns = torch.linalg.vector_norm(A, dim=0)
    assert ((Q @ R - A).norm(dim=0) / columns).max() < 20 * eps
    assert (Q.mT @ Q - torch.eye(8, dtype=dtype)).norm() < 20 * eps


def test_gaussian_numbers_depend_on_their_place_only(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gaussian_rows(slice(0, 200), 33, seed=5)
    assert torch.equal(gaussian_rows(slice(17, 101), 20, seed=5), whole[17:101, :20])
    monkeypatch.setattr(gaussian, "PIECE_VALUES", 40)
    assert torch.equal(gaussian_rows(slice(0, 200), 33, seed=5), whole)
    assert not torch.equal(gaussian_rows(slice(0, 200), 33, seed=6), whole)


@pytest.mark.parametrize("seed", [0, 1, -7, 2**40])
def test_gaussian_numbers_look_normal(seed: int) -> None:
    """Moments of 400,000 numbers within five standard errors; extreme singular values of a random matrix."""
    z = gaussian_rows(slice(1000, 3000), 200, seed=seed)
    for power, moment, deviation in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs(float((z**power).mean()) - moment) < 5 * deviation / z.numel() ** 0.5
    s = torch.linalg.svdvals(z)
    assert float(s[0]) == pytest.approx(2000**0.5 + 200**0.5, rel=0.02)
    assert float(s[-1]) == pytest.approx(2000**0.5 - 200**0.5, rel=0.02)
    assert abs(float((z[:, :-1] * z[:, 1:]).mean())) < 5 / z.numel() ** 0.5


def test_seeds_give_independent_numbers() -> None:
    a, b = (gaussian_rows(slice(0, 1000), 100, seed=seed) for seed in (3, 4))
    assert abs(float((a * b).mean())) < 5 / a.numel() ** 0.5


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
        (torch.ones(3), "ConfigError: W is '1-d'; must have 2 dimensions on every process; process 1's"),
        (torch.ones(2, 2, dtype=torch.int64), "ConfigError: W.dtype is 'other'; must be float64, float32"),
        (torch.ones(2, 3), "WorldError: the blocks of W have widths 2 (process 0), 3 (process 1); must be"),
        (torch.ones(2, 2).double(), "WorldError: the blocks of W have dtypes torch.float32 (process 0)"),
        (torch.ones(2, 2) / 0, "NonFiniteError: W holds 4 NaN or Inf among 8 values (4 on process 1)"),
    ],
)
def test_all_processes_tell_what_one_did_wrong(bad: torch.Tensor, expected: str) -> None:
    told = outcomes(2, lambda c: agree(bad if c.rank else torch.ones(2, 2), c, "W"))
    assert len(set(told)) == 1
    assert told[0].startswith(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_are_cast_up(dtype: torch.dtype) -> None:
    A, _ = agree(torch.ones(2, 2, dtype=dtype), blocks.communicator(None), "A")
    assert A.dtype == torch.float32


@pytest.mark.parametrize("size", [1, 3])
def test_lanczos_finds_the_spectral_norm(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(blocks, "GRAM_WIDTH", 10)
    noise = torch.randn(60, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for A in (noise, torch.ones(60, 50).double(), torch.zeros(60, 50).double()):
        exact = float(torch.linalg.matrix_norm(A, 2))
        parts = A.split([60 // size] * size)
        for found in run_threads(size, lambda c, p=parts: spectral_norm(p[c.rank], c)):
            assert exact * (1 - 1e-6) <= found <= exact * (1 + 1e-12)
