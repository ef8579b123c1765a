"""Dealing work: balance, determinism, rounds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hpc_oialr.linalg.work_plan import longest_processing_time, rounds

costs = st.lists(st.floats(0.1, 1e6), min_size=1, max_size=40)


@given(costs, st.integers(1, 8))
def test_bound_of_graham(costs: list[float], processes: int) -> None:
    owner = longest_processing_time(costs, processes)
    load = [sum(c for c, o in zip(costs, owner, strict=True) if o == p) for p in range(processes)]
    lower_bound = max(max(costs), sum(costs) / processes)
    assert max(load) <= 2 * lower_bound * (1 + 1e-12)
    assert owner == longest_processing_time(costs, processes)


@given(costs, st.integers(1, 8))
def test_rounds_hold_every_job_once_and_one_per_process(costs: list[float], processes: int) -> None:
    owner = longest_processing_time(costs, processes)
    plan = rounds(owner, processes)
    assert sorted(job for members in plan for job in members) == list(range(len(costs)))
    for members in plan:
        assert len({owner[job] for job in members}) == len(members)
