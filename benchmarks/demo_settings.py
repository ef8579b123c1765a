"""What the demo's settings were chosen by: each candidate over several seeds, on validation images.

Every run is `oialr train fashion_mnist_vit` with the overrides below and 5,000 of the training images
held out; the test set plays no part. Runs have one thread each, two at a time; `cpu_s` is that thread's
processor time, start and evaluations included, which other work on the machine disturbs least.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.common import Row, arguments, earlier, finish, print_table

DENSE = ["--oialr", "null"]
ADAMW = ["--optimizer", "AdamW", "--optimizer.betas", "[0.9, 0.999]", "--optimizer.fused", "true"]
CANDIDATES: dict[str, list[str]] = {
    # Dense, each with the best of its learning rates: AdamW 2.5e-4, 3.5e-4, 5e-4, 1e-3; Muon .005, .01.
    "dense AdamW": [*DENSE, *ADAMW, "--optimizer.lr", "3.5e-4", "--train.epochs", "2.4"],
    "dense Muon": [
        *DENSE, "--optimizer.dense_algorithm", "muon", "--optimizer.lr", "0.005", "--train.epochs", "1",
    ],
    # OIALR as in the recipe, and with the published kind of optimizer.
    "OIALR, AdamW then Muon": [],
    "OIALR, Muon throughout": ["--optimizer.dense_algorithm", "muon", "--optimizer.lr", "0.005"],
    "OIALR, AdamW, moments carried": [*ADAMW, "--optimizer.lr", "5e-4"],
    "OIALR, AdamW, moments zeroed (published)": [
        *ADAMW, "--optimizer.lr", "5e-4", "--oialr.carry_moments", "false",
    ],
}  # fmt: skip


def main() -> None:
    """Run the table."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(CANDIDATES), help="names of candidates")
    options = parser.parse_args()
    rows = earlier(options.out)
    done = {(row["run"], row["seed"], row["settings"]) for row in rows}
    jobs = [(name, seed) for seed in options.seeds for name in options.only]
    jobs = [(name, seed) for name, seed in jobs if (name, seed, " ".join(CANDIDATES[name])) not in done]
    with ThreadPoolExecutor(max_workers=2) as pool:
        for row in pool.map(lambda job: run(*job), jobs):
            rows.append(row)
            # Half an hour of runs: what is done is kept.
            finish(rows, options.out, summary=summary(rows, options.only))
    print_table(summary(rows, options.only))


def run(name: str, seed: int) -> Row:
    """Train one candidate with one seed."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        settings = ["--data.validation", "5000", "--train.seed", str(seed), "--train.evaluations", "3"]
        command = ["train", "fashion_mnist_vit", *settings, *CANDIDATES[name], "--out", str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        cpu_s = processor_seconds([sys.executable, "-m", "hpc_oialr", *command], environment)
        result = json.loads((folder / "summary.json").read_text())
        curve = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validation = [row for row in curve if row.get("split") == "validation"]
    return {
        "run": name,
        "seed": seed,
        "validation_accuracy": validation[-1]["metric"],
        "wall_s": result["wall_s"],
        "cpu_s": cpu_s,
        "update_wall_s": result["update_wall_s"],
        "trained_share": result["trainable_params"] / result["dense_trainable_params"],
        "steps": result["steps"],
        "curve": [[round(row["wall_s"], 1), row["metric"]] for row in validation],
        "settings": " ".join(CANDIDATES[name]),
    }


def processor_seconds(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """Run a command to its end; the processor time it took (s)."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_utime + usage.ru_stime


def summary(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Mean over the seeds."""
    table = []
    for name in names:
        mine = [row for row in rows if row["run"] == name]
        if not mine:
            continue
        accuracies = [row["validation_accuracy"] for row in mine]
        table.append({
            "run": name,
            "seeds": len(mine),
            "accuracy_mean": statistics.mean(accuracies),
            "accuracy_min": min(accuracies),
            "cpu_s": statistics.mean(row["cpu_s"] for row in mine),
            "trained_share": mine[0]["trained_share"],
        })  # fmt: skip
    return table


if __name__ == "__main__":
    main()
