"""Launchers' variables, and the traps that users fall into, without any launcher."""

from __future__ import annotations

import pytest

from hpc_oialr.distributed.environment import (
    LaunchInfo,
    gpus_per_node,
    in_step,
    launch_info,
    node_name,
    recorded_variables,
)
from hpc_oialr.errors import WorldError

ALLOCATION = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "a[01-02]",
    "SLURM_NTASKS": "7",
    "SLURM_TASKS_PER_NODE": "4,3",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
STEP = ALLOCATION | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "a[01-02]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "none",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "1234567",
}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "3"}


def without(env: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in names}


def test_nothing_set_is_one_process() -> None:
    info = launch_info({})
    assert (info.rank, info.size, info.local_rank, info.local_size, info.launcher) == (0, 1, 0, 1, "single")


def test_torchrun() -> None:
    assert launch_info(TORCHRUN) == LaunchInfo(3, 8, 1, 2, "torchrun", "head", 29400)


def test_torchrun_inside_an_allocation_and_inside_a_step_wins() -> None:
    assert launch_info(TORCHRUN | ALLOCATION) == launch_info(TORCHRUN)
    assert launch_info(TORCHRUN | STEP) == launch_info(TORCHRUN)


def test_srun() -> None:
    info = launch_info(STEP)
    assert (info.rank, info.size, info.local_rank, info.local_size) == (5, 7, 1, 3)
    assert (info.launcher, info.master_addr) == ("slurm", "a01")


def test_tasks_per_node_in_slurms_short_form() -> None:
    env = STEP | {
        "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
        "SLURM_NODEID": "2",
        "SLURM_STEP_NODELIST": "a[1-4]",
    }
    assert launch_info(env).local_size == 2


def test_an_older_slurm_sets_the_jobs_variables_only() -> None:
    env = without(STEP, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST", "SLURM_STEP_ID")
    assert launch_info(env | {"SLURM_STEPID": "0"}) == launch_info(STEP)


def test_a_step_of_fewer_tasks_than_the_job_counts_its_own() -> None:
    env = STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "a02"}
    info = launch_info(env | {"SLURM_PROCID": "1", "SLURM_NODEID": "0"})
    assert (info.size, info.local_size, info.master_addr) == (2, 2, "127.0.0.1")


def test_a_shell_inside_an_allocation_is_one_process() -> None:
    assert launch_info(ALLOCATION).size == 1
    assert launch_info(ALLOCATION).launcher == "single"


@pytest.mark.parametrize("step", ["4294967290", "4294967291", "4294967295"])
def test_batch_scripts_and_interactive_shells_are_no_step(step: str) -> None:
    assert not in_step(ALLOCATION | {"SLURM_STEP_ID": step})
    assert launch_info(ALLOCATION | {"SLURM_STEP_ID": step}).size == 1


def test_the_port_is_equal_on_all_tasks_and_outside_the_ephemeral_range() -> None:
    other = STEP | {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
    assert launch_info(STEP).master_port == launch_info(other).master_port
    ports = [launch_info(STEP | {"SLURM_JOB_ID": str(job)}).master_port for job in range(1, 100_000, 37)]
    assert min(ports) >= 20_000
    assert max(ports) < 32_768


def test_array_tasks_and_steps_of_a_job_get_ports_of_their_own() -> None:
    def port(job: int, step: int) -> int:
        env = {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step), "SLURM_ARRAY_JOB_ID": "4711"}
        return launch_info(STEP | env).master_port

    assert len({port(job, step) for job in range(4711, 4811) for step in range(4)}) == 400


def test_an_address_and_a_port_that_are_given_are_kept() -> None:
    info = launch_info(STEP | {"MASTER_ADDR": "ib-a01", "MASTER_PORT": "12345"})
    assert (info.master_addr, info.master_port) == ("ib-a01", 12345)


def test_mpirun_on_one_node() -> None:
    info = launch_info(OPEN_MPI)
    assert (info.rank, info.size, info.local_rank, info.local_size) == (1, 4, 1, 4)
    assert (info.launcher, info.master_addr) == ("mpi", "127.0.0.1")
    assert launch_info(OPEN_MPI | {"PMIX_NAMESPACE": "7654321"}).master_port != info.master_port


def test_mpirun_on_several_nodes_needs_an_address_or_slurm() -> None:
    env = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(WorldError, match=r"MASTER_ADDR is not set.*4 ranks.*mpirun -x MASTER_ADDR=HOST"):
        launch_info(env)
    assert launch_info(env | {"MASTER_ADDR": "head"}).master_addr == "head"
    assert launch_info(env | ALLOCATION).master_addr == "a01"


def test_mpirun_whose_daemons_are_a_slurm_step() -> None:
    daemon = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1"}
    assert launch_info(STEP | daemon | OPEN_MPI).size == 4
    assert launch_info(STEP | daemon | HYDRA).launcher == "mpi"


def test_an_mpi_of_one_inside_a_step_of_many_is_not_believed() -> None:
    alone = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "PMI_RANK": "0", "PMI_SIZE": "1"}
    assert launch_info(STEP | alone).size == 7


def test_mpich() -> None:
    info = launch_info(HYDRA)
    assert (info.rank, info.size, info.local_rank, info.local_size, info.launcher) == (2, 3, 2, 3, "mpi")


def test_srun_with_pmi2() -> None:
    assert launch_info(STEP | {"PMI_RANK": "5", "PMI_SIZE": "7"}) == launch_info(STEP)


BAD = {
    "rank without size": (
        without(TORCHRUN, "WORLD_SIZE"),
        r"WORLD_SIZE is not set; must be a whole number",
    ),
    "size without rank": ({"WORLD_SIZE": "8"}, r"WORLD_SIZE is 8 but RANK is not set.*unset WORLD_SIZE"),
    "rank too large": (
        TORCHRUN | {"RANK": "8"},
        r"rank is 8 of 8 \(torchrun\); must lie in \[0, 8\)",
    ),
    "no number": (TORCHRUN | {"RANK": "one"}, r"RANK is 'one'; must be a whole number"),
    "no address": (
        without(TORCHRUN, "MASTER_ADDR"),
        r"MASTER_ADDR is not set; must name the host",
    ),
    "no port": (without(TORCHRUN, "MASTER_PORT"), r"MASTER_PORT is not set; must be a port"),
    "no local rank": (without(TORCHRUN, "LOCAL_RANK"), r"LOCAL_RANK is not set"),
    "local beyond all": (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, r"9 ranks on this node but 8 in all"),
    "stale size 1 under srun": (STEP | {"RANK": "0", "WORLD_SIZE": "1"}, r"srun started 7 tasks.*Unset RANK"),
    "another size under srun": (
        STEP | {"WORLD_SIZE": "8"},
        r"8 but srun started 7 tasks.*--ntasks",
    ),
    "counts and tasks": (
        STEP | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
        r"7 tasks, .* per node \[4, 4\]",
    ),
    "node beyond the list": (STEP | {"SLURM_NODEID": "2"}, r"seen from node 2"),
    "stripped step": (without(STEP, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), r"none of .*Pass --export=ALL"),
}


@pytest.mark.parametrize("case", BAD)
def test_contradictions_are_errors(case: str) -> None:
    env, message = BAD[case]
    with pytest.raises(WorldError, match=message):
        launch_info(env)


def test_a_sweep_of_torchruns_under_srun_is_legal() -> None:
    env = STEP | TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    assert launch_info(env).size == 1


def test_a_node_has_slurms_name() -> None:
    assert node_name({"SLURMD_NODENAME": "node3"}) == "node3"
    assert node_name({})


def test_gpus_of_a_node() -> None:
    assert gpus_per_node({"SLURM_GPUS_PER_NODE": "a100:4"}) == 4
    assert gpus_per_node({"SLURM_GPUS_ON_NODE": "2"}) == 2
    assert gpus_per_node({}) is None


def test_secrets_are_not_recorded() -> None:
    env = STEP | {
        "OIALR_API_KEY": "s3cret",
        "NCCL_TOKEN": "s3cret",
        "TORCH_PASSWORD": "s3cret",
        "HDF5_SECRET": "s3cret",
        "SLURM_JWT": "s3cret",
        "AWS_SECRET_ACCESS_KEY": "s3cret",
        "HOME": "/home/someone",
        "NCCL_SOCKET_IFNAME": "ib0",
        "OMP_NUM_THREADS": "2",
    }
    recorded = recorded_variables(env)
    assert "s3cret" not in recorded.values()
    assert "HOME" not in recorded
    assert recorded["NCCL_SOCKET_IFNAME"] == "ib0"
    assert recorded["OMP_NUM_THREADS"] == "2"
    assert recorded["SLURM_JOB_ID"] == "4711"


def test_secrets_inside_of_values_are_masked() -> None:
    env = {"OIALR_DATA": "https://me:s3cret@host/data?token=s3cret", "NCCL_DEBUG": "WARN"}
    assert recorded_variables(env) == {"NCCL_DEBUG": "WARN", "OIALR_DATA": "https://***@host/data?token=***"}
