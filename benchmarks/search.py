"""A hyperparameter search under a real Slurm, the local one of env/local_slurm.sh, killed in the middle and continued.

`oialr search fashion_mnist_vit`, narrower and on a third of the images, on its own space: 12 trials, three at a time, one
thread each. The command is killed once four trials are over, and called again. Then the best trial and the recipe itself
are trained with seeds that the search has not seen. As root; about ten minutes on two cores.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Row, arguments, finish
from benchmarks.slurm_cluster import Cluster, until, why_not

RECIPE = "fashion_mnist_vit"
TRIALS, PARALLEL, KILL_AFTER = 12, 3, 4
SETTINGS = [
    "--model.dim", "192", "--data.limit", "20000", "--train.epochs", "2", "--train.evaluations", "6",
    "--checkpoint.every", "50",
]  # fmt: skip
VALIDATION = ["--data.validation", "5000"]
SEEDS = (1, 2, 3)
WITHIN_S = 3600.0


def main() -> None:
    """Search, kill, search, and train both again."""
    options = arguments(__doc__ or "").parse_args()
    if (reason := why_not()) is not None:
        sys.exit(reason)
    with Cluster() as cluster:
        folder, start = cluster.root / "search", time.monotonic()
        log = cluster.root / "search.txt"
        watch = {"most_jobs_at_a_time": 0}
        first = _start(cluster, folder, log)
        until(lambda: _over(log) >= KILL_AFTER or _watched(cluster, first, watch), "some trials", WITHIN_S)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        over, before = _over(log), {path: path.stat().st_mtime_ns for path in folder.glob("trial_*/summary.json")}
        begun = len(list(folder.glob("trial_*")))
        log.rename(log.with_suffix(".first"))
        second = _start(cluster, folder, log)
        until(lambda: _watched(cluster, second, watch), "the end of the search", WITHIN_S)
        said = log.read_text()
        assert second.returncode == 0, said
        rows = _trials(folder)
        jobs = [json.loads(path.read_text())["job_id"] for path in folder.glob("trial_*/job.json")]
        search = {
            "recipe": RECIPE,
            "settings": [*VALIDATION, *SETTINGS],
            "wall_s": round(time.monotonic() - start, 1),
            "trials_over_when_killed": over,
            "trials_running_when_killed": begun - over,
            "taken_up_again": sum("taken up again" in line for line in said.splitlines()),
            "run_again": sum("runs again" in line or "runs anew" in line for line in said.splitlines()),
            "finished_runs_untouched": all(path.stat().st_mtime_ns == at for path, at in before.items()),
            "jobs": len(set(jobs)),
            **watch,
            "verdict": next(
                line for line in said.splitlines() if "the recipe itself, v" in line or "itself: v" in line
            ),
        }
        finish(rows, options.out, search=search, seeds=[])
        finish(rows, options.out, search=search, seeds=_seeds(cluster, folder))


def _start(cluster: Cluster, folder: Path, log: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-u", "-m", "hpc_oialr", "search", RECIPE, "--trials", str(TRIALS)]
    words += ["--parallel", str(PARALLEL), "--out", str(folder), *SETTINGS]
    with log.open("w") as file:
        return subprocess.Popen(
            words, env=cluster.environment, cwd=cluster.root, stdout=file, stderr=subprocess.STDOUT, text=True
        )


def _over(log: Path) -> int:
    """Trials that the command has told the end of."""
    return sum(
        ": metric " in line or "stopped early" in line or "failed" in line for line in log.read_text().splitlines()
    )


def _watched(cluster: Cluster, search: subprocess.Popen[str], watch: dict[str, int]) -> bool:
    """Whether the command has ended; counts running jobs meanwhile."""
    running = len(cluster.call("squeue", "--noheader", "--states=RUNNING", "--format=%i").split())
    watch["most_jobs_at_a_time"] = max(watch["most_jobs_at_a_time"], running)
    time.sleep(1.0)
    return search.poll() is not None


def _trials(folder: Path) -> list[Row]:
    def read(text: str) -> Any:
        try:
            return json.loads(text.lower() if text in ("True", "False") else text)
        except ValueError:
            return text or None

    with (folder / "trials.csv").open() as file:
        return [{name: read(text) for name, text in row.items()} for row in csv.DictReader(file)]


def _seeds(cluster: Cluster, folder: Path) -> list[Row]:
    """Metrics of the best trial and of the recipe with other seeds, on test data."""
    sides = {"best": [str(folder / "best.yaml")], "recipe": [RECIPE, *VALIDATION, *SETTINGS]}
    runs = {}
    for side, (recipe, *settings) in sides.items():
        for seed in SEEDS:
            out = cluster.root / f"{side}_{seed}"
            words = ["--nodes=1", "--out", str(out), *settings, "--train.seed", str(seed)]
            runs[side, seed] = out, cluster.submit(recipe, *words)
    rows = []
    for (side, seed), (out, job) in runs.items():
        until(lambda out=out: (out / "summary.json").exists(), f"the run {out.name}", WITHIN_S)
        job.wait()
        summary = json.loads((out / "summary.json").read_text())
        names = ("metric_name", "metric", "best_metric", "trainable_params")
        rows.append({"side": side, "seed": seed, **{name: summary[name] for name in names}})
    return rows


if __name__ == "__main__":
    main()
