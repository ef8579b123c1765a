"""A run under a real Slurm that is ended in several ways, one after the other, against an undisturbed one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.mpirun import HERE, WHY_NOT

from benchmarks.fault_injection import (
    TINY,
    WARNING_S,
    killed,
    outcome,
    preemption,
    requeued_by_hand,
    strike,
    time_limit,
)
from benchmarks.slurm_cluster import Cluster, Job
from hpc_oialr.record import read_metrics

SCRIPT = str(HERE / "slurm" / "fashion_mnist.sh")


@pytest.fixture(scope="module")
def runs(cluster: Cluster, whole: Callable[[], Path]) -> tuple[Path, Path, Job]:
    """Folders of an undisturbed run and of one that was struck at two steps, and the latter's job."""
    folder = cluster.root / "it's $(struck)"
    options = [f"--signal=USR2@{WARNING_S}", "--job-name=a 'b' $(touch broken)", "--output=struck.out"]
    job = cluster.sbatch("--nodes=2", *options, SCRIPT, *TINY, OIALR_OUT=str(folder))
    strike(job, folder / "metrics.jsonl", [time_limit, killed])
    return whole(), folder, job


def test_two_blows_lose_nothing(runs: tuple[Path, Path, Job]) -> None:
    whole, struck, job = runs
    assert job.fields()["Restarts"] == "2"
    assert outcome(struck) == outcome(whole)


def test_the_job_tells_its_life(runs: tuple[Path, Path, Job]) -> None:
    *_, job = runs
    assert re.search(r"stopped after step \d+: signal USR2", job.output)
    told = re.findall(r"oialr: (.*requeue \d of 20)\n", job.output)
    assert told == ["stopped with a checkpoint; requeue 1 of 20", "killed by signal 9; requeue 2 of 20"]
    assert "left in the job" in job.output


def test_names_are_no_commands(runs: tuple[Path, Path, Job], cluster: Cluster) -> None:
    assert not list(cluster.root.rglob("broken"))


@pytest.mark.long
def test_preempted_and_requeued_by_hand(cluster: Cluster, whole: Callable[[], Path]) -> None:
    folder = cluster.root / "others"
    job = cluster.sbatch("--nodes=2", f"--signal=USR2@{WARNING_S}", SCRIPT, *TINY, OIALR_OUT=str(folder))
    strike(job, folder / "metrics.jsonl", [preemption, requeued_by_hand])
    assert "stopped with a checkpoint; requeue 1 of 20" in job.output
    assert "requeue 2 of 20" not in job.output, "Slurm itself counts the one by hand"
    assert outcome(folder) == outcome(whole())


@pytest.mark.long
@pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
def test_metrics_go_over_mpi(cluster: Cluster) -> None:
    """One task on each of two nodes."""
    folder = cluster.root / "mpi"
    settings = [*TINY, "--train.steps", "12"]
    cluster.sbatch("--nodes=2", SCRIPT, *settings, OIALR_OUT=str(folder), OIALR_MPI="pmix").wait()
    assert "metrics go over mpi" in (folder / "logs" / "process_0.log").read_text()
    assert json.loads((folder / "summary.json").read_text())["world_size"] == 2
    updates = read_metrics(folder / "updates.jsonl")
    assert [len(row["update_s"]) for row in updates] == [2]
