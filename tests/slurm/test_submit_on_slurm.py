"""A run by ``oialr submit`` under a real Slurm that is ended before its time, against an undisturbed one of a script."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.fault_injection import TINY, WARNING_S, batch_shell, outcome, strike
from benchmarks.slurm_cluster import Cluster, Job, until

pytest.importorskip("submitit", reason="submitit is not installed: pip install 'hpc_oialr[slurm]'")


def submit(cluster: Cluster, folder: Path, *words: str) -> Job:
    """Submit the tiny recipe on two nodes; its job."""
    return cluster.submit("fashion_mnist_vit", "--nodes=2", "--out", str(folder), *words, *TINY)


@pytest.fixture(scope="module")
def struck(cluster: Cluster) -> tuple[Path, Job]:
    """Folder and job of a run that was struck once; other blows come to the same requeue, as in test_life."""
    folder = cluster.root / 'it\'s "$(touch broken)"'
    job = submit(cluster, folder, f"--signal-s={WARNING_S}", "--max-requeues=1")
    strike(job, folder / "metrics.jsonl", [batch_shell])
    return folder, job


def test_a_blow_loses_nothing(struck: tuple[Path, Job], whole: Callable[[], Path], cluster: Cluster) -> None:
    folder, _ = struck
    assert outcome(folder) == outcome(whole())
    assert not list(cluster.root.rglob("broken"))


def test_jobs_tell_of_them(struck: tuple[Path, Job], cluster: Cluster) -> None:
    folder, job = struck
    table = cluster.oialr("jobs", str(folder))
    assert f"{job.number} " in table
    assert "COMPLETED   1 of 1     60 of 60" in table
    assert "requeue 1 of 1" in cluster.oialr("logs", str(folder))


def test_an_error_that_starting_again_does_not_cure(cluster: Cluster) -> None:
    """srun ends the other task, and reports the code of the one that had a reason."""
    job = submit(cluster, cluster.root / "wrong", "--data.data_dir", "/nonexistent")
    until(lambda: job.state not in ("PENDING", "RUNNING", "COMPLETING"), "the end of the job")
    fields = job.fields()
    assert (fields["JobState"], fields["Restarts"], fields["ExitCode"]) == ("FAILED", "0", "202:0")
    said = cluster.oialr("jobs", str(cluster.root / "wrong"))
    assert "oialr: error: fashion-mnist is not here; looked in /nonexistent" in said
