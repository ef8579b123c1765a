"""The job around a process."""

from __future__ import annotations

import pytest

from hpc_oialr.distributed.slurm_job import SlurmJob, max_requeues, slurm_job
from hpc_oialr.errors import ConfigError


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
    with pytest.raises(
        ConfigError, match="OIALR_MAX_REQUEUES is '' .from the environment.; must be a whole number"
    ):
        max_requeues({"OIALR_MAX_REQUEUES": ""})
