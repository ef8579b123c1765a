"""Four ways in which a job under a real Slurm ends before its run does, and what the run must be in the end."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.slurm_cluster import Cluster, Job, awaits, is_paused, until
from hpc_oialr.record import read_metrics
from hpc_oialr.spectra import Spectra

TINY = [
    "--model.dim", "32", "--model.depth", "1", "--model.heads", "2", "--train.steps", "60", "--data.limit", "2000",
    "--train.global_batch", "32", "--train.evaluations", "2", "--train.evaluation_batch", "2000", "--oialr.delay", "8",
    "--oialr.frequency", "9", "--checkpoint.every", "4", "--record.every", "1",
]  # fmt: skip
STEPS = (9, 20, 31, 42)
# Jobs are to be warned so long before their end (s).
WARNING_S = 600


def outcome(folder: Path) -> dict[str, Any]:
    """What must be equal: weights, losses by step, spectra."""
    summary = json.loads((folder / "summary.json").read_text())
    rows = read_metrics(folder / "metrics.jsonl")
    spectra = Spectra(folder)
    return {
        "weights": summary["weights_sha256"],
        "metric": summary["metric"],
        "losses": [(row["step"], row.get("loss"), row.get("metric")) for row in rows],
        "spectra": {name: (layer.r.tolist(), str(layer.singular_values.tolist())) for name, layer in spectra.items()},
    }


def time_limit(cluster: Cluster, job: Job, tasks: list[int]) -> None:
    """Slurm warns the run: its job has less time left than it wants to be warned before."""
    hours, minutes, _ = job.fields()["RunTime"].split(":")
    limit = 60 * int(hours) + int(minutes) + WARNING_S // 60 - 1
    cluster.call("scontrol", "update", f"jobid={job.number}", f"timelimit={limit}")
    until(lambda: not any(is_paused(task) for task in tasks), "the signal before the end")


def preemption(cluster: Cluster, job: Job, tasks: list[int]) -> None:
    """A job of the partition urgent wants the same nodes."""
    nodes = job.fields()["NodeList"]
    cluster.sbatch("--partition=urgent", f"--nodelist={nodes}", "--exclusive", "--output=/dev/null", "--wrap=true")
    until(lambda: not any(is_paused(task) for task in tasks), "the signal of preemption")


def requeued_by_hand(cluster: Cluster, job: Job, tasks: list[int]) -> None:
    """Slurm kills the run itself."""
    cluster.call("scontrol", "requeue", job.number)


def killed(cluster: Cluster, job: Job, tasks: list[int]) -> None:
    """One process dies without a word."""
    os.kill(tasks[1], signal.SIGKILL)


def batch_shell(cluster: Cluster, job: Job, tasks: list[int]) -> None:
    """The warning reaches the batch script alone, as with --signal=B:USR2, and is handed on."""
    cluster.call("scancel", "--batch", "--signal=USR2", job.number)
    until(lambda: all(awaits(task, signal.SIGUSR2) for task in tasks), "the signal that the script hands on")


Blow = Callable[[Cluster, Job, list[int]], None]


def strike(job: Job, metrics: Path, blows: Sequence[Blow]) -> None:
    """End a job of two tasks in up to four ways, one after the other, and let it come to its end."""
    for _ in strikes(job, metrics, zip(STEPS[: len(blows)], blows, strict=True)):
        pass


def strikes(job: Job, metrics: Path, blows: Iterable[tuple[int, Blow]]) -> Iterator[Blow]:
    """End a job of two tasks once past each step, and let it come to its end; each blow, before the job goes on."""
    for step, blow in blows:
        with ExitStack() as stack:
            tasks = job.pause_at(step, metrics, stack)
            assert len(tasks) == 2
            blow(job.cluster, job, tasks)
        job.start_again()
        yield blow
    job.wait()
