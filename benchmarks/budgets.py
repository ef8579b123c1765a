"""Test accuracy against training time at several budgets: the demo's two sides, each run with its own schedule.

The demo compares one budget; this says what happens at others. Every run is `oialr train fashion_mnist_vit` from
scratch in a process of its own with one thread: the dense baseline (Muon) and OIALR, the recipe's settings with the
conversion and the updates at the same shares of the run. The training clock counts processor seconds (evaluations and
the start left out), which other work on the machine disturbs least. Interrupted calls go on where they stopped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import Row, arguments, earlier, finish, print_table

# The recipe's own length and steps, which longer and shorter runs are scaled from.
EPOCHS, DELAY, FREQUENCY = 3.5, 56, 60
MUON = ["--optimizer.dense_algorithm", "muon", "--optimizer.lr", "0.005"]
DENSE = ["--oialr", "null", *MUON]
# Converted later, at a larger r, into bases chosen by the inputs and trained at the end, as was best on CIFAR-10.
FOLLOWING = [
    *MUON, "--optimizer.bases_lr", "0.005", "--oialr.importance", "inputs", "--oialr.delay", "0.1", "--oialr.frequency",
    "0.04", "--oialr.rule.fraction", "0.25", "--oialr.bases_trained", "[[0.7,null]]",
]  # fmt: skip
# The most telling runs first: these take hours on one core.
RUNS = [
    ("dense", 4.0), ("OIALR", 14.0), ("OIALR, bases that follow", 12.0), ("dense", 1.0), ("OIALR", 3.5),
    ("dense", 2.0), ("OIALR", 7.0), ("dense", 0.5), ("OIALR", 2.0),
]  # fmt: skip

# The trainer's clock is told to count processor time; nothing else in the process is changed.
CHILD = """
import sys, time, types
from hpc_oialr.train import timing
timing.time = types.SimpleNamespace(perf_counter=time.process_time)
from hpc_oialr.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def settings(side: str, epochs: float) -> list[str]:
    """Overrides of the recipe."""
    if side == "dense":
        return [*DENSE, "--train.epochs", f"{epochs:g}"]
    if side != "OIALR":
        return [*FOLLOWING, "--train.epochs", f"{epochs:g}"]
    scale = epochs / EPOCHS
    delay, frequency = (str(round(scale * steps)) for steps in (DELAY, FREQUENCY))
    return ["--oialr.delay", delay, "--oialr.frequency", frequency, "--train.epochs", f"{epochs:g}"]


def run(side: str, epochs: float, seed: int) -> Row:
    """Train one side at one budget."""
    overrides = settings(side, epochs)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        options = [*overrides, "--train.seed", str(seed), "--train.evaluations", "6", "--out", str(folder)]
        command = [sys.executable, "-c", CHILD, "train", "fashion_mnist_vit", *options]
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(options)} ended with {done.returncode}: {done.stderr[-2000:]}")
        result = json.loads((folder / "summary.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [(row["step"], round(row["wall_s"], 1), row["metric"]) for row in lines if "metric" in row]
    return {
        "run": side,
        "epochs": epochs,
        "seed": seed,
        "test_accuracy": result["metric"],
        "cpu_s": result["wall_s"],
        "trained_share": result["trainable_params"] / result["dense_trainable_params"],
        "steps": result["steps"],
        "curve": [[step / result["steps"] * epochs, seconds, metric] for step, seconds, metric in curve],
        "settings": " ".join(overrides),
    }


def main() -> None:
    """Run what is not in the file yet."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", choices=sorted({side for side, _ in RUNS}), help="one side")
    options = parser.parse_args()
    rows = earlier(options.out)
    for seed in options.seeds:
        for side, epochs in RUNS:
            known = {(row["seed"], row["settings"]) for row in rows}
            wanted = (seed, " ".join(settings(side, epochs)))
            if wanted in known or options.only not in (None, side):
                continue
            rows.append(run(side, epochs, seed))
            finish(rows, options.out)
    print_table([{key: row[key] for key in row if key not in ("curve", "settings")} for row in rows])


if __name__ == "__main__":
    main()
