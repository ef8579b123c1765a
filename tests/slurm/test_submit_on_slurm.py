"""A run by ``oialr submit`` under a real Slurm, ended in four ways, against an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import ExitStack

import pytest
from support.slurm_cluster import Job, is_paused, until

from hpc_oialr.record import read_metrics

pytest.importorskip("submitit", reason="submitit is not installed: pip install 'hpc_oialr[slurm]'")

TINY = [
    "--model.dim", "32", "--model.depth", "1", "--model.heads", "2", "--train.steps", "60", "--data.limit", "2000",
    "--train.global_batch", "32", "--train.evaluations", "2", "--train.evaluation_batch", "2000", "--oialr.delay", "8",
    "--oialr.frequency", "9", "--checkpoint.every", "4", "--record.every", "1",
]  # fmt: skip


def oialr(cluster, *words):
    return cluster.call(sys.executable, "-m", "hpc_oialr", *words)


def submit(cluster, folder, *words):
    """Submit the tiny recipe on two nodes; its job."""
    said = oialr(cluster, "submit", "fashion_mnist_vit", "--nodes=2", "--out", str(folder), *words, *TINY)
    return Job(cluster, said.removeprefix("job ").partition(":")[0])


def outcome(folder):
    """What must be equal."""
    summary = json.loads((folder / "summary.json").read_text())
    losses = [
        (row["step"], row.get("loss"), row.get("metric")) for row in read_metrics(folder / "metrics.jsonl")
    ]
    return summary["weights_sha256"], summary["metric"], losses


def warned(tasks):
    """Slurm lets a task go on before it sends it a signal."""
    until(lambda: not any(is_paused(task) for task in tasks), "the warning")


def time_limit(cluster, job, tasks):
    """The job has less time left than it wants to be warned before."""
    hours, minutes, _ = job.fields()["RunTime"].split(":")
    soon = 60 * int(hours) + int(minutes) + 9
    cluster.call("scontrol", "update", f"jobid={job.number}", f"timelimit={soon}")
    warned(tasks)


def preemption(cluster, job, tasks):
    nodes = job.fields()["NodeList"]
    cluster.sbatch(
        "--partition=urgent", f"--nodelist={nodes}", "--exclusive", "--output=/dev/null", "--wrap=true"
    )
    warned(tasks)


def requeue(cluster, job, tasks):
    cluster.call("scontrol", "requeue", job.number)


def kill(cluster, job, tasks):
    os.kill(tasks[1], signal.SIGKILL)


@pytest.fixture(scope="module")
def runs(cluster):
    """Folders of an undisturbed run and of one that was struck four times, and the latter's job."""
    whole, struck = cluster.root / "undisturbed", cluster.root / 'it\'s "$(touch broken)"'
    job = submit(cluster, struck, "--signal-s=600", "--max-requeues=4")
    other = submit(cluster, whole)
    for step, blow in ((9, time_limit), (20, preemption), (31, requeue), (42, kill)):
        with ExitStack() as stack:
            tasks = job.pause_at(step, struck / "metrics.jsonl", stack)
            assert len(tasks) == 2
            blow(cluster, job, tasks)
        job.start_again()
    job.wait()
    other.wait()
    return whole, struck, job


def test_four_blows_lose_nothing(runs, cluster):
    whole, struck, _ = runs
    assert outcome(struck) == outcome(whole)
    assert not list(cluster.root.rglob("broken"))


def test_jobs_tell_of_them(runs, cluster):
    *_, struck, job = runs
    table = oialr(cluster, "jobs", str(struck))
    assert f"{job.number} " in table
    assert "COMPLETED   4 of 4     60 of 60" in table
    assert "requeue 4 of 4" in oialr(cluster, "logs", str(struck))


def test_an_error_that_starting_again_does_not_cure(cluster):
    """srun ends the other task, and reports the code of the one that had a reason."""
    job = submit(cluster, cluster.root / "wrong", "--data.data_dir", "/nonexistent")
    until(lambda: job.state not in ("PENDING", "RUNNING", "COMPLETING"), "the end of the job")
    fields = job.fields()
    assert (fields["JobState"], fields["Restarts"], fields["ExitCode"]) == ("FAILED", "0", "202:0")
    said = oialr(cluster, "jobs", str(cluster.root / "wrong"))
    assert "oialr: error: Fashion-MNIST is not here; looked in /nonexistent" in said
