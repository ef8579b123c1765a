"""Messages: what arrives, how many bytes leave, and what is said when something cannot be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.threads import ThreadCommunicator, run_threads

from hpc_oialr.linalg.communicator import Communicator, children, communicator, parent
from hpc_oialr.linalg.tsqr import tsqr_svd

sizes = st.integers(1, 9)


@given(sizes)
def test_tree_joins_all_processes(size: int) -> None:
    assert sorted(child for rank in range(size) for child in children(rank, size)) == list(range(1, size))
    assert all(parent(child) == rank for rank in range(size) for child in children(rank, size))


@settings(deadline=None)
@given(sizes, st.integers(0, 8))
def test_collectives(size: int, src: int) -> None:
    def all_of_them(c: ThreadCommunicator) -> tuple[torch.Tensor, ...]:
        mine = torch.full((2,), float(c.rank + 1))
        rows = [p % 3 for p in range(size)]
        gathered = c.all_gather_rows(torch.full((rows[c.rank], 2), float(c.rank)), rows)
        scattered = c.reduce_scatter([mine * p for p in range(size)])
        return (
            c.broadcast(mine.clone(), src=src % size),
            c.all_reduce(mine),
            c.all_reduce(mine, "max"),
            c.all_reduce(mine, "min"),
            gathered[:, 0],
            scattered,
        )

    total = size * (size + 1) / 2
    rows = torch.cat([torch.full((p % 3,), float(p)) for p in range(size)])
    for rank, found in enumerate(run_threads(size, all_of_them)):
        expected = [src % size + 1, total, size, 1]
        assert [float(part[0]) for part in found[:4]] == expected
        assert torch.equal(found[4], rows)
        assert torch.equal(found[5], torch.full((2,), total * rank))


def test_bytes_of_tsqr() -> None:
    """Up: half of R. Down: rows of M, s and Vh. Beside the headers and the table of shapes."""

    def sent(c: ThreadCommunicator) -> int:
        tsqr_svd(torch.randn(20, 8, dtype=torch.float64), c)
        return c.bytes_sent

    n, table = 8, 2 * 32
    down = 8 * (n * n + n * (n + 1)) + 24 + table
    assert run_threads(2, sent) == [down, 8 * n * (n + 1) // 2 + 32 + table]


def test_bytes_of_a_wide_matrix_that_stays_in_blocks() -> None:
    """Nobody sends or holds more than its block, and m x m numbers."""

    def sent(c: ThreadCommunicator) -> int:
        tsqr_svd(torch.randn(2, 400, dtype=torch.float64), c, vh="block")
        return c.bytes_sent

    for found in run_threads(4, sent):
        assert found <= 8 * 2 * 300 + 2 * 8 * (2 * 8 * 8 + 8) + 1000


def test_picks_by_type() -> None:
    alone = communicator(None)
    assert (type(alone), alone.rank, alone.size) == (Communicator, 0, 1)
    assert communicator(alone) is alone
    with pytest.raises(TypeError, match=r"group is a str; must be None, a torch\.distributed\.ProcessGroup"):
        communicator("gloo")
