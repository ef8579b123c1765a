"""A run by ``oialr submit`` under a real Slurm that is ended before its time, against an undisturbed one of a script."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.fault_injection import TINY, WARNING_S, batch_shell, killed, outcome, strike
from benchmarks.slurm_cluster import Cluster, Job, until

pytest.importorskip("submitit", reason="submitit is not installed: pip install 'hpc_oialr[slurm]'")


def submit(cluster: Cluster, folder: Path, *words: str) -> Job:
    """Submit the tiny recipe on two nodes; its job."""
    return cluster.submit("fashion_mnist_vit", "--nodes=2", "--out", str(folder), *words, *TINY)


@pytest.fixture(
    scope="module", params=[[batch_shell], pytest.param([batch_shell, killed], marks=pytest.mark.long)], ids=len
)
def struck(cluster: Cluster, request: pytest.FixtureRequest) -> tuple[Path, Job, int]:
    """Folder and job of a run, and how often it was struck; other blows come to the same requeue, as in test_life."""
    count = len(request.param)
    folder = cluster.root / f'it\'s "$(touch broken)" {count}'
    job = submit(cluster, folder, f"--signal-s={WARNING_S}", f"--max-requeues={count}")
    strike(job, folder / "metrics.jsonl", request.param)
    return folder, job, count


def test_blows_lose_nothing(struck: tuple[Path, Job, int], whole: Callable[[], Path], cluster: Cluster) -> None:
    folder, *_ = struck
    assert outcome(folder) == outcome(whole())
    assert not list(cluster.root.rglob("broken"))


def test_jobs_tell_of_them(struck: tuple[Path, Job, int], cluster: Cluster) -> None:
    folder, job, count = struck
    table = cluster.oialr("jobs", str(folder))
    assert f"{job.number} " in table
    assert f"COMPLETED   {count} of {count}     60 of 60" in table
    assert f"requeue {count} of {count}" in cluster.oialr("logs", str(folder))


def test_an_error_that_starting_again_does_not_cure(cluster: Cluster) -> None:
    """srun ends the other task, and reports the code of the one that had a reason."""
    job = submit(cluster, cluster.root / "wrong", "--data.data_dir", "/nonexistent")
    until(lambda: job.state not in ("PENDING", "RUNNING", "COMPLETING"), "the end of the job")
    fields = job.fields()
    assert (fields["JobState"], fields["Restarts"], fields["ExitCode"]) == ("FAILED", "0", "202:0")
    said = cluster.oialr("jobs", str(cluster.root / "wrong"))
    assert "oialr: error: fashion-mnist is not here; looked in /nonexistent" in said
