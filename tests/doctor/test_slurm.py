"""Faults of Slurm, planted as programs that answer what Slurm 22.05 answers then."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from support.slurm_step import step

from hpc_oialr.doctor import run_checks, slurm
from hpc_oialr.doctor.context import SLURM_PROGRAMS, Finding

NO_MUNGE = """sinfo: error: If munged is up, restart with --num-threads=10
sinfo: error: Munge encode failed: Failed to access "/run/munge/munge.socket.2": No such file or directory
sinfo: error: slurm_send_node_msg: auth_g_create: REQUEST_PARTITION_INFO has authentication error
slurm_load_partitions: Protocol authentication error"""


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.fixture(autouse=True)
def cluster(programs):
    programs.put_cluster()


def test_a_healthy_cluster(context):
    who = context({"SLURM_JOB_ID": "7"}, partition="urgent")
    checks = (
        slurm.check_programs,
        slurm.check_cluster,
        slurm.check_job,
    )
    findings = [finding for check in checks for finding in check(who)]
    assert {finding.state for finding in findings} == {"ok"}
    assert list(by_name(findings)) == [
        "Slurm programs",
        "slurmctld",
        "munge",
        "partition",
        "job",
    ]


def test_no_slurm_is_one_note(context, programs):
    programs.remove(*SLURM_PROGRAMS)
    who = context()
    assert slurm.check_programs(who) == [Finding("note", "Slurm", "no Slurm here")]
    assert not who.in_scope("slurm")


def test_a_container_in_a_job_has_no_programs(context, programs):
    programs.remove(*SLURM_PROGRAMS)
    (found,) = slurm.check_programs(context({"SLURM_JOB_ID": "7"}))
    assert (found.state, found.found) == ("note", "none inside this job, as in most containers")


def test_some_programs_are_missing(context, programs):
    programs.remove("squeue", "scancel")
    (found,) = slurm.check_programs(context())
    assert (found.state, found.found) == ("problem", "missing: squeue, scancel")
    assert "apt-get install slurm-client" in found.fix


def test_no_munge(context, programs):
    programs.put("sinfo", err=NO_MUNGE, code=1)
    (found,) = slurm.check_cluster(context({"SLURMD_NODENAME": "node3"}))
    assert (found.name, found.state) == ("munge", "problem")
    assert found.found.startswith("this user gets no credential: Munge encode failed: Failed to access")
    assert found.fix.startswith("systemctl start munge   (as root on node3")


def test_the_controller_is_down(context, programs):
    programs.put("sinfo", err="slurm_load_partitions: Unable to contact slurm controller (connect failure)", code=1)
    (found,) = slurm.check_cluster(context())
    assert (found.name, found.state) == ("slurmctld", "problem")
    assert "sinfo: slurm_load_partitions: Unable to contact slurm controller" in found.found
    assert found.fix.startswith("scontrol ping")


def test_no_configuration(context, programs):
    programs.put("sinfo", err="sinfo: fatal: Could not establish a configuration source", code=1)
    (found,) = slurm.check_cluster(context())
    assert found.found == "sinfo: fatal: Could not establish a configuration source"
    assert found.fix.startswith("export SLURM_CONF=")


def test_a_hanging_sinfo_is_ended_with_its_children(context, programs):
    programs.hang("sinfo")
    (found,) = slurm.check_cluster(context(timeout_s=0.5))
    assert (found.name, found.state, found.found) == ("slurmctld", "problem", "sinfo: no answer in time")
    assert found.fix.startswith("scontrol ping")
    group = int((programs.path / "sinfo.pid").read_text())
    assert gone(group)


def test_what_a_hanging_program_has_said_is_kept(context, programs):
    programs.hang("sinfo", "main*|up")
    answer = context(timeout_s=0.5).run("sinfo")
    assert (answer.stdout, answer.code, answer.trouble) == ("main*|up\n", None, "hung")


def gone(group: int) -> bool:
    """Whether no process of a group is left; zombies of init's need a moment."""
    for _ in range(100):
        members = [stat for stat in Path("/proc").glob("[0-9]*/stat") if _group(stat) == group]
        if not members:
            return True
        time.sleep(0.05)
    return False


def _group(stat: Path) -> int:
    try:
        state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return 0
    return 0 if state == "Z" else int(group)


@pytest.mark.parametrize(
    ("asked", "found", "fix"),
    [
        ("urgnt", "there is no 'urgnt'; there are: main, urgent", "--partition urgent"),
        ("xyz", "there is no 'xyz'; there are: main, urgent", "--partition main"),
        ("main,gpu", "there is no 'gpu'; there are: main, urgent", "--partition main"),
    ],
)
def test_a_missing_partition(context, asked, found, fix):
    partition = by_name(slurm.check_cluster(context(partition=asked)))["partition"]
    assert (partition.state, partition.found, partition.fix) == ("problem", found, fix)


def test_a_partition_that_is_down(context, programs):
    programs.put("sinfo", "main*|up|0/1/0/1\ngpu|down|0/1/0/1")
    partition = by_name(slurm.check_cluster(context(partition="gpu")))["partition"]
    assert partition.state == "problem"
    assert partition.found == "'gpu' is down; jobs there do not start"
    assert partition.fix == "--partition main"


def test_a_partition_whose_nodes_are_all_down(context, programs):
    programs.put("sinfo", "main*|up|0/0/4/4")
    partition = by_name(slurm.check_cluster(context()))["partition"]
    assert partition.state == "problem"
    assert partition.found == "'main' has no node that is not down or drained; jobs there do not start"
    assert partition.fix.startswith("sinfo -R")


def test_no_default_partition(context, programs):
    programs.put("sinfo", "main|up|0/1/0/1")
    partition = by_name(slurm.check_cluster(context()))["partition"]
    assert (partition.state, partition.fix) == ("note", "--partition main")


def test_a_shell_that_outlived_its_job(context, programs):
    programs.put("squeue", err="slurm_load_jobs error: Invalid job id specified", code=1)
    (found,) = slurm.check_job(context({"SLURM_JOB_ID": "4711"}))
    assert found.state == "problem"
    assert found.found == "SLURM_JOB_ID is 4711, but there is no such job any more"
    assert found.fix == "unset ${!SLURM_@}"


def test_one_process_of_a_job_asks(context, programs):
    programs.hang("sinfo")
    who = context(step(1, 2))
    assert who.place is not None
    assert not who.in_scope("main")
    assert "slurmctld" not in by_name(run_checks(who))
    assert not (programs.path / "sinfo.pid").exists()
