"""Slurm's variables: the job around a process, and short forms against what they stand for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_oialr.distributed.slurm import (
    SlurmJob,
    expand_counts,
    expand_nodes,
    gpu_count,
    max_requeues,
    slurm_job,
)
from hpc_oialr.errors import ConfigError, WorldError

NODE_LISTS = {
    "node1": ["node1"],
    "a[01-03,7],b2": ["a01", "a02", "a03", "a7", "b2"],
    "hkn[0998-1001]": ["hkn0998", "hkn0999", "hkn1000", "hkn1001"],
    "r[1-2]n[01-02]": ["r1n01", "r1n02", "r2n01", "r2n02"],
    "jwb[0001]-ib,x[5]": ["jwb0001-ib", "x5"],
    "a-b.example.org": ["a-b.example.org"],
}


@pytest.mark.parametrize("text", NODE_LISTS)
def test_node_lists(text: str) -> None:
    assert expand_nodes(text) == NODE_LISTS[text]


@pytest.mark.parametrize("text", ["", "a[1-3", "a1-3]", "a[3-1]", "a[5,3-1]", "a[x]", "a,,b", "a[[1]]", "a[]"])
def test_a_damaged_node_list_is_an_error(text: str) -> None:
    with pytest.raises(WorldError, match=r"node list is .* must look like 'a\[01-03,7\],b2'.*MASTER_ADDR"):
        expand_nodes(text)


@given(st.lists(st.integers(0, 9999), min_size=1, max_size=20))
def test_a_bracket_of_single_nodes_keeps_order_and_zeros(numbers: list[int]) -> None:
    text = ",".join(f"{n:04d}" for n in numbers)
    assert expand_nodes(f"n[{text}]") == [f"n{n:04d}" for n in numbers]


@given(st.lists(st.tuples(st.integers(0, 128), st.integers(1, 5)), min_size=1, max_size=8))
def test_counts(groups: list[tuple[int, int]]) -> None:
    text = ",".join(f"{tasks}(x{nodes})" if nodes > 1 else str(tasks) for tasks, nodes in groups)
    assert expand_counts(text) == [tasks for tasks, nodes in groups for _ in range(nodes)]


@pytest.mark.parametrize("text", ["", "4(x", "four", "4,"])
def test_damaged_counts_are_an_error(text: str) -> None:
    with pytest.raises(WorldError, match=r"tasks per node are .* must look like '4\(x2\),3'"):
        expand_counts(text)


@pytest.mark.parametrize(("text", "count"), [("", None), ("4", 4), ("a100:4", 4), ("a100:2,v100:1", 3)])
def test_gpus_per_node(text: str, count: int | None) -> None:
    assert gpu_count(text) == count


def test_no_job():
    assert slurm_job({}) is None


def test_a_job():
    assert slurm_job({"SLURM_JOB_ID": "12"}) == SlurmJob("12")
    env = {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "3", "SLURM_JOB_END_TIME": "1795512704"}
    assert slurm_job(env) == SlurmJob("12", 3, 1795512704.0)


def test_an_arrays_task_has_a_name_of_its_own():
    """The last task bears the number of the whole array: to requeue that would requeue all."""
    env = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "4"}
    assert slurm_job(env) == SlurmJob("12_4")


def test_how_often():
    assert max_requeues({}) == 20
    assert max_requeues({"OIALR_MAX_REQUEUES": "0"}) == 0
    with pytest.raises(ConfigError, match="OIALR_MAX_REQUEUES is '' .from the environment.; must be a whole number"):
        max_requeues({"OIALR_MAX_REQUEUES": ""})
