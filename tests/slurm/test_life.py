"""A run under a real Slurm that is ended in four ways, one after the other, against an undisturbed one."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.mpirun import HERE, WHY_NOT
from support.slurm_cluster import Cluster, Job, is_paused, until

from hpc_oialr.record import read_metrics
from hpc_oialr.spectra import Spectra

SCRIPT = str(HERE / "slurm" / "fashion_mnist.sh")
TINY = [
    "--model.dim", "32", "--model.depth", "1", "--model.heads", "2", "--train.steps", "60", "--data.limit", "2000",
    "--train.global_batch", "32", "--train.evaluations", "2", "--train.evaluation_batch", "2000", "--oialr.delay", "8",
    "--oialr.frequency", "9", "--checkpoint.every", "4", "--record.every", "1",
]  # fmt: skip
STEPS = (9, 20, 31, 42)


def outcome(folder: Path) -> dict[str, Any]:
    """What must be equal: weights, losses by step, spectra."""
    summary = json.loads((folder / "summary.json").read_text())
    rows = read_metrics(folder / "metrics.jsonl")
    spectra = Spectra(folder)
    return {
        "weights": summary["weights_sha256"],
        "metric": summary["metric"],
        "losses": [(row["step"], row.get("loss"), row.get("metric")) for row in rows],
        "spectra": {
            name: (layer.r.tolist(), str(layer.singular_values.tolist())) for name, layer in spectra.items()
        },
    }


def time_limit(cluster: Cluster, job: Job, tasks: list[int]) -> None:
    """Slurm warns the run: its job has less than 115 seconds left, of between 60 and 120."""
    hours, minutes, _ = job.fields()["RunTime"].split(":")
    limit = 60 * int(hours) + int(minutes) + 2
    cluster.call("scontrol", "update", f"jobid={job.number}", f"timelimit={limit}")
    until(lambda: not any(is_paused(task) for task in tasks), "the signal before the end")


def preemption(cluster: Cluster, job: Job, tasks: list[int]) -> None:
    """A job of the partition urgent wants the same nodes."""
    nodes = job.fields()["NodeList"]
    cluster.sbatch(
        "--partition=urgent", f"--nodelist={nodes}", "--exclusive", "--output=/dev/null", "--wrap=true"
    )
    until(lambda: not any(is_paused(task) for task in tasks), "the signal of preemption")


def requeued_by_hand(cluster: Cluster, job: Job, tasks: list[int]) -> None:
    """Slurm kills the run itself."""
    cluster.call("scontrol", "requeue", job.number)


def killed(cluster: Cluster, job: Job, tasks: list[int]) -> None:
    """One process dies without a word."""
    os.kill(tasks[1], signal.SIGKILL)


BLOWS: list[Callable[[Cluster, Job, list[int]], None]] = [time_limit, preemption, requeued_by_hand, killed]


@pytest.fixture(scope="module")
def runs(cluster: Cluster) -> tuple[Path, Path, Job]:
    """Folders of an undisturbed run and of one that was struck at four steps, and the latter's job."""
    folders = cluster.root / "whole", cluster.root / "it's $(struck)"
    whole = cluster.sbatch("--nodes=2", SCRIPT, *TINY, OIALR_OUT=str(folders[0]))
    options = ["--nodes=2", "--signal=USR2@115", "--job-name=a 'b' $(touch broken)", "--output=struck.out"]
    job = cluster.sbatch(*options, SCRIPT, *TINY, OIALR_OUT=str(folders[1]))
    for step, blow in zip(STEPS, BLOWS, strict=True):
        with ExitStack() as stack:
            tasks = job.pause_at(step, folders[1] / "metrics.jsonl", stack)
            assert len(tasks) == 2
            blow(cluster, job, tasks)
        job.start_again()
    job.wait()
    whole.wait()
    return *folders, job


def test_four_blows_lose_nothing(runs: tuple[Path, Path, Job]) -> None:
    whole, struck, job = runs
    assert job.fields()["Restarts"] == "4"
    assert outcome(struck) == outcome(whole)


def test_the_job_tells_its_life(runs: tuple[Path, Path, Job]) -> None:
    *_, job = runs
    assert re.search(r"stopped after step \d+: signal USR2", job.output)
    told = re.findall(r"oialr: (.*requeue \d of 20)\n", job.output)
    assert told[:2] == [
        "stopped with a checkpoint; requeue 1 of 20",
        "stopped with a checkpoint; requeue 2 of 20",
    ]
    assert "requeue 3 of 20" not in job.output, "Slurm itself counts the one by hand"
    assert told[2:] == ["killed by signal 9; requeue 4 of 20"]
    assert "left in the job" in job.output


def test_names_are_no_commands(runs: tuple[Path, Path, Job], cluster: Cluster) -> None:
    assert not list(cluster.root.rglob("broken"))


@pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
def test_metrics_go_over_mpi(cluster: Cluster) -> None:
    """Two nodes with two tasks each."""
    folder = cluster.root / "mpi"
    settings = [*TINY, "--train.steps", "12"]
    cluster.sbatch(
        "--nodes=2", "--ntasks-per-node=2", SCRIPT, *settings, OIALR_OUT=str(folder), OIALR_MPI="pmix"
    ).wait()
    assert "metrics go over mpi" in (folder / "logs" / "process_0.log").read_text()
    assert json.loads((folder / "summary.json").read_text())["world_size"] == 4
    updates = read_metrics(folder / "updates.jsonl")
    assert [len(row["update_s"]) for row in updates] == [4]
