"""More threads than cores, tasks that srun bound to one core, limits that are too low."""

from __future__ import annotations

import resource

import pytest
from support.slurm_step import step

from hpc_oialr.doctor import limits

STEP = step(SLURMD_NODENAME="node1")


@pytest.mark.parametrize(
    ("environ", "cores", "found", "fix"),
    [
        ({"OMP_NUM_THREADS": "8"}, 2, "OMP_NUM_THREADS is 8, but this process may run on 2 cores", 2),
        (
            STEP | {"OMP_NUM_THREADS": "16"},
            64,
            "4 processes with 16 threads each share 32 cores of node1",
            8,
        ),
        (
            STEP | {"OMP_NUM_THREADS": "8", "SLURM_CPUS_PER_TASK": "4"},
            32,
            "OMP_NUM_THREADS is 8, but a task has 4 cores",
            4,
        ),
        ({"OMP_NUM_THREADS": "all"}, 2, "OMP_NUM_THREADS is 'all'; must be a whole number", 2),
    ],
)
def test_more_threads_than_cores(context, environ, cores, found, fix):
    problem = limits.threads_finding(context(environ), cores, 32)
    assert (problem.name, problem.state, problem.found) == ("threads", "problem", found)
    assert problem.fix == f"export OMP_NUM_THREADS={fix}"


@pytest.mark.parametrize("environ", [{}, STEP, {"OMP_NUM_THREADS": "32"}, STEP | {"OMP_NUM_THREADS": "8"}])
def test_threads_that_fit(context, environ):
    assert limits.threads_finding(context(environ), 32, 32).state == "ok"


def test_this_machine(context):
    cores = limits.usable_cores()
    (found,) = limits.check_threads(context({"OMP_NUM_THREADS": str(cores + 1)}))
    assert found.state == "problem"
    (found,) = limits.check_threads(context({"OMP_NUM_THREADS": "1"}))
    assert found.state == "ok"


def test_srun_does_not_inherit_cpus_per_task(context):
    who = context(STEP | {"SLURM_CPUS_PER_TASK": "8"})
    (found,) = limits.binding_findings(who, 1)
    assert (found.state, found.found) == (
        "problem",
        "SLURM_CPUS_PER_TASK is 8, but srun bound this task to 1",
    )
    assert found.fix.startswith("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK")
    assert [finding.state for finding in limits.binding_findings(who, 8)] == ["ok"]
    assert limits.binding_findings(context(STEP), 1) == []


def test_open_files():
    assert limits.open_files_finding(1024, 1).state == "ok"
    assert limits.open_files_finding(resource.RLIM_INFINITY, 4096).state == "ok"
    found = limits.open_files_finding(1024, 512)
    assert (found.state, found.found) == ("problem", "1,024; 512 processes need 2,304")
    assert found.fix == "ulimit -n 2304"


def test_locked_memory():
    assert limits.locked_memory_finding(resource.RLIM_INFINITY).state == "ok"
    found = limits.locked_memory_finding(8 * 2**20)
    assert (found.state, found.found) == ("problem", "8,192 KiB; InfiniBand needs it unlimited")
    assert found.fix.startswith("ulimit -l unlimited")


def test_shared_memory(context):
    assert limits.shared_memory_finding(context(), 2**30).state == "ok"
    assert limits.shared_memory_finding(context(), 2**26).state == "note"
    found = limits.shared_memory_finding(context(STEP), 2**26)
    assert (found.state, found.found) == (
        "problem",
        "64 MiB: too little for NCCL and the workers of data loaders",
    )
    assert found.fix.startswith("docker run --shm-size=8g")


def test_limits_of_this_machine(context):
    assert {finding.name for finding in limits.check_limits(context())} >= {"open files"}
