"""The life of jobs under a real Slurm, the local one of env/local_slurm.sh with four nodes.

Ten interruptions in a row, of five kinds, of a run by `sbatch` and of one by `oialr submit`; jobs that must not
come back, and one that must; and every batch script in smoke mode on 1, 2 and 4 nodes. As root; about half an
hour on two cores. Goes on where it was interrupted.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Row, arguments, earlier, finish
from benchmarks.fault_injection import (
    TINY,
    WARNING_S,
    killed,
    outcome,
    preemption,
    requeued_by_hand,
    strikes,
    time_limit,
)
from benchmarks.slurm_cluster import HERE, Cluster, Job, last_step, scripts, until, why_not
from hpc_oialr.record import read_metrics

SCRIPT = str(HERE / "slurm" / "fashion_mnist.sh")
SETTINGS = [*TINY, "--train.steps", "140", "--checkpoint.every", "7"]
OVER = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
NODES = (1, 2, 4)


def node_failure(cluster: Cluster, job: Job, tasks: list[int]) -> None:
    """The controller gives up a node of the job."""
    node = "node" + job.fields()["NodeList"].rpartition("-")[2].strip("node[]")
    cluster.call("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    until(lambda: job.state == "PENDING", "a requeue")
    # It comes back by itself when it reports next.
    if "down" in cluster.call("sinfo", "--noheader", f"--nodes={node}", "--format=%T"):
        cluster.call("scontrol", "update", f"nodename={node}", "state=resume")


BLOWS = (time_limit, preemption, requeued_by_hand, killed, node_failure) * 2
STEPS = tuple(range(8, 8 + 12 * len(BLOWS), 12))


def main() -> None:
    """Run what is not on record yet."""
    options = arguments(__doc__ or "").parse_args()
    reason = why_not()
    if reason is not None:
        sys.exit(reason)
    rows = earlier(options.out)
    with Cluster() as cluster:
        if not _on_record(rows, "interruption"):
            rows += interruptions(cluster)
            finish(rows, options.out)
        if not _on_record(rows, "ending"):
            rows += endings(cluster)
            finish(rows, options.out)
        for script in scripts():
            for nodes in NODES:
                name = f"{script.stem} on {nodes}"
                if not any(row["what"] == name for row in rows):
                    rows.append(smoke(cluster, script, nodes, name))
                    finish(rows, options.out)
    if not all(row["as it must"] for row in rows):
        sys.exit("not everything went as it must")


def _on_record(rows: list[Row], part: str) -> bool:
    return any(row["part"] == part for row in rows)


def _row(part: str, what: str, seconds: float, fine: bool, **more: Any) -> Row:
    return {"part": part, "what": what, "seconds": round(seconds, 1), "as it must": fine, **more}


# -- ten interruptions ---------------------------------------------------------------------------


def interruptions(cluster: Cluster) -> list[Row]:
    """A run on two nodes by each way of submitting, struck ten times, against an undisturbed one."""
    whole = cluster.root / "whole"
    cluster.sbatch("--nodes=2", SCRIPT, *SETTINGS, OIALR_OUT=str(whole)).wait()
    rows = []
    for submitted, start in (("sbatch", _by_sbatch), ("oialr submit", _by_submit)):
        folder = cluster.root / submitted
        rows += _strikes(start(cluster, folder), folder, whole, submitted)
    return rows


def _by_sbatch(cluster: Cluster, folder: Path) -> Job:
    options = ["--nodes=2", f"--signal=USR2@{WARNING_S}", "--output=struck.out"]
    return cluster.sbatch(*options, SCRIPT, *SETTINGS, OIALR_OUT=str(folder))


def _by_submit(cluster: Cluster, folder: Path) -> Job:
    options = ["--nodes=2", f"--signal-s={WARNING_S}", "--out", str(folder)]
    return cluster.submit("fashion_mnist_vit", *options, *SETTINGS)


def _strikes(job: Job, folder: Path, whole: Path, submitted: str) -> list[Row]:
    rows, again, start = [], 0, time.monotonic()
    for blow in strikes(job, folder / "metrics.jsonl", zip(STEPS, BLOWS, strict=True)):
        done, now = _steps(folder), time.monotonic()
        again += done["steps done again"]
        what = f"{submitted}: {blow.__name__}"
        rows.append(_row("interruption", what, now - start, True, **done))
        start = now
    equal = outcome(folder) == outcome(whole) and int(job.fields()["Restarts"]) == len(BLOWS)
    what = f"{submitted}: bitwise the undisturbed run"
    return [*rows, _row("interruption", what, 0.0, equal, **{"steps done again": again})]


def _steps(folder: Path) -> dict[str, int]:
    """Step to which the run had come, and how many of its steps the next job, not yet begun, will do once more."""
    reached = last_step(folder / "metrics.jsonl")
    checkpoint = max(int(path.name[5:]) for path in (folder / "checkpoints").glob("step_*"))
    return {"at step": reached, "steps done again": reached - checkpoint}


# -- endings -------------------------------------------------------------------------------------


def endings(cluster: Cluster) -> list[Row]:
    """What becomes of jobs whose run is a program that only waits, or ends with some code."""
    programs = cluster.root / "programs"
    programs.mkdir()
    cases = {
        "cancelled: stays cancelled": ("sleep 300", "CANCELLED"),
        "killed by its time limit: requeued": ("sleep 300", "PENDING"),
        "finished: over": ("exit 0", "COMPLETED"),
        "an error of its user: over": ("exit 2", "FAILED"),
        "stopped: requeued": ("exit 75", "PENDING"),
        "stopped once too often: over": ("exit 75", "FAILED"),
    }
    return [_ending(cluster, programs, what, *case) for what, case in cases.items()]


def _ending(cluster: Cluster, programs: Path, what: str, line: str, expected: str) -> Row:
    start = time.monotonic()
    (programs / "srun").write_text(f"#!/bin/bash\n{line}\n")
    (programs / "srun").chmod(0o755)
    limit = "0" if "too often" in what else "20"
    path = f"{programs}:{cluster.environment['PATH']}"
    job = cluster.sbatch("--time=1", "--signal=USR1@1", SCRIPT, PATH=path, OIALR_VENV="/none", OIALR_MAX_REQUEUES=limit)
    if "cancelled" in what:
        until(lambda: job.state == "RUNNING", "its start")
        time.sleep(1)
        cluster.call("scancel", job.number)
    until(lambda: job.state in OVER or job.fields()["Restarts"] == "1", what)
    until(lambda: job.state in (*OVER, "PENDING"), what)
    state = job.state
    if state == "PENDING":
        cluster.call("scancel", job.number)
    return _row("ending", what, time.monotonic() - start, state == expected, state=state)


# -- every script --------------------------------------------------------------------------------


def smoke(cluster: Cluster, script: Path, nodes: int, what: str) -> Row:
    """A script with its own recipe and model for four steps, one process a node."""
    start = time.monotonic()
    folder = cluster.root / what.replace(" ", "-")
    job = cluster.sbatch(f"--nodes={nodes}", str(script), OIALR_SMOKE="1", OIALR_OUT=str(folder))
    until(lambda: job.state in OVER, what, within_s=1800)
    fine = job.state == "COMPLETED" and (folder / "summary.json").exists()
    if not fine:
        print(job.output)
        return _row("smoke", what, time.monotonic() - start, fine, state=job.state)
    losses = [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    return _row("smoke", what, time.monotonic() - start, fine, state=job.state, loss=losses[-1])


if __name__ == "__main__":
    main()
