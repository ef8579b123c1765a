"""More threads than cores, tasks that srun bound to one core, limits that are too low."""

from __future__ import annotations

import resource
from types import SimpleNamespace

import pytest
from support.slurm_step import step

from hpc_oialr.doctor import host

STEP = step(SLURMD_NODENAME="node1")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Pretends that a machine has so many cores, 32 in all, and such limits; finds the finding of a name."""

    def pretend(cores=32, files=4096, locked=resource.RLIM_INFINITY, shared=2**30):
        (tmp_path / "mlx5_0").touch()
        space = SimpleNamespace(f_blocks=shared, f_frsize=1)
        both = {resource.RLIMIT_NOFILE: files, resource.RLIMIT_MEMLOCK: locked}
        monkeypatch.setattr(host, "usable_cores", lambda: cores)
        monkeypatch.setattr(host.os, "cpu_count", lambda: 32)
        monkeypatch.setattr(host.os, "statvfs", lambda path: space)
        monkeypatch.setattr(host.resource, "getrlimit", lambda which: (both[which], resource.RLIM_INFINITY))
        monkeypatch.setattr(host, "_INFINIBAND", tmp_path)
        return find

    def find(context, name="open files"):
        return next(finding for finding in host.check_limits(context) if finding.name == name)

    return pretend


@pytest.mark.parametrize(
    ("environ", "cores", "found", "fix"),
    [
        ({"OMP_NUM_THREADS": "8"}, 2, "OMP_NUM_THREADS is 8, but this process may run on 2 cores", 2),
        (
            STEP | {"OMP_NUM_THREADS": "16"},
            64,
            "4 ranks with 16 threads each share 32 cores of node1",
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
def test_more_threads_than_cores(context, machine, environ, cores, found, fix):
    machine(cores=cores)
    problem = host.check_threads(context(environ))[0]
    assert (problem.name, problem.state, problem.found) == ("threads", "problem", found)
    assert problem.fix == f"export OMP_NUM_THREADS={fix}"


@pytest.mark.parametrize("environ", [{}, STEP, {"OMP_NUM_THREADS": "32"}, STEP | {"OMP_NUM_THREADS": "8"}])
def test_threads_that_fit(context, machine, environ):
    machine(cores=32)
    assert [finding.state for finding in host.check_threads(context(environ))] == ["ok"]


def test_this_machine(context):
    cores = host.usable_cores()
    (found,) = host.check_threads(context({"OMP_NUM_THREADS": str(cores + 1)}))
    assert found.state == "problem"
    (found,) = host.check_threads(context({"OMP_NUM_THREADS": "1"}))
    assert found.state == "ok"


def test_srun_does_not_inherit_cpus_per_task(context, machine):
    who = context(STEP | {"SLURM_CPUS_PER_TASK": "8"})
    machine(cores=1)
    _, found = host.check_threads(who)
    assert (found.state, found.found) == (
        "problem",
        "SLURM_CPUS_PER_TASK is 8, but srun bound this task to 1",
    )
    assert found.fix.startswith("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK")
    assert len(host.check_threads(context(STEP))) == 1
    machine(cores=8)
    assert [finding.state for finding in host.check_threads(who)] == ["ok", "ok"]


def test_open_files(context, machine):
    assert machine(files=1024)(context()).state == "ok"
    assert machine(files=resource.RLIM_INFINITY)(context(step(0, 4096))).state == "ok"
    found = machine(files=1024)(context(step(0, 512)))
    assert (found.state, found.found) == ("problem", "1,024; 512 ranks need 2,304")
    assert found.fix == "ulimit -n 2304"


def test_locked_memory(context, machine):
    assert machine(locked=resource.RLIM_INFINITY)(context(), "locked memory").state == "ok"
    found = machine(locked=8 * 2**20)(context(), "locked memory")
    assert (found.state, found.found) == ("problem", "8,192 KiB; InfiniBand needs it unlimited")
    assert found.fix.startswith("ulimit -l unlimited")


def test_shared_memory(context, machine):
    assert machine(shared=2**30)(context(), "/dev/shm").state == "ok"
    assert machine(shared=2**26)(context(), "/dev/shm").state == "note"
    found = machine(shared=2**26)(context(STEP), "/dev/shm")
    assert (found.state, found.found) == (
        "problem",
        "64 MiB: too little for NCCL and the workers of data loaders",
    )
    assert found.fix.startswith("docker run --shm-size=8g")


def test_limits_of_this_machine(context):
    assert {finding.name for finding in host.check_limits(context())} >= {"open files"}
