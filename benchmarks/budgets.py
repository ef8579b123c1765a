"""Test accuracy against training time at several budgets: the demo's model, each run with a schedule of its own.

    python -m benchmarks.budgets --out benchmarks/results/budgets.json --parallel 2
    python -m benchmarks.budgets --out FILE --seeds 0 1 --times 1 2
    python -m benchmarks.budgets --trials --out benchmarks/results/budgets_trials.json --parallel 2

The demo compares one budget; this says what happens at others. Every run is `oialr train fashion_mnist_vit` from
scratch in a process of its own with one thread: the dense baseline (Muon) and OIALR, the recipe's settings with the
conversion and the updates at the same shares of the run. Both flip images at random, without which runs of more than a
few epochs learn the training images by heart. The training clock counts processor seconds (evaluations and the start
left out), which other work on the machine disturbs least. Rows that are in the file are not run again.

`--trials`: further settings of long OIALR runs, against dense training of four epochs; 5,000 of the training images are
held out to judge them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.common import Row, arguments, print_table
from benchmarks.row_file import RowFile

# The recipe's own length and steps, which longer and shorter runs are scaled from.
EPOCHS, DELAY, FREQUENCY = 3.5, 56, 60
# Epochs of OIALR for each of dense Muon: about the same time, or less.
PER_DENSE_EPOCH = 5.5
# Dense epochs; the most telling first.
TIMES = (1.0, 2.0, 0.5, 4.0)
FLIP = ["--data.augment.flip", "true"]
DECAY = ["--optimizer.weight_decay", "0.05", "--oialr.importance", "auto"]
MIXUP = [*DECAY, "--task.mixup", "0.2"]
FREE = [*MIXUP, "--oialr.bases_trained", "[[0.6,null]]", "--optimizer.bases_lr", "0.005"]
MUON = ["--optimizer.dense_algorithm", "muon", "--optimizer.lr", "0.005", "--oialr.delay", "234"]
LATE = ["--oialr.delay", "0.3"]
# Epochs and settings beside those of an OIALR run of this length.
TRIALS: dict[str, tuple[float, list[str]]] = {
    "weight decay .01, crops of images padded by 2": (22, ["--data.augment.padding", "2"]),
    "bases by inputs": (22, DECAY),
    "the same, label smoothing .1, crops of images padded by 1": (
        22,
        [*DECAY, "--task.label_smoothing", "0.1", "--data.augment.padding", "1"],
    ),
    "bases by inputs, mixup .2": (22, MIXUP),
    "the same, bases trained from 60 % on": (22, FREE),
    "the same, Muon in the dense phase": (22, [*FREE, *MUON]),
    "bases by inputs, converted at 30 %": (16, [*DECAY, *LATE]),
    "the same, mixup .2": (16, [*MIXUP, *LATE]),
}
KEY = ("run", "epochs", "seed", "settings")

# The trainer's clock is told to count processor time; nothing else in the process is changed.
CHILD = """
import sys, time, types
from hpc_oialr.train import timing
timing.time = types.SimpleNamespace(perf_counter=time.process_time)
from hpc_oialr.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def dense_rate(epochs: float) -> float:
    """Muon's rate: .005 was best at one epoch (`demo_settings`), half of it at four, on validation images."""
    return 0.005 if epochs <= 2 else 0.0025


def settings(side: str, epochs: float) -> list[str]:
    """Overrides of the recipe."""
    if side == "dense":
        muon = ["--optimizer.dense_algorithm", "muon", "--optimizer.lr", f"{dense_rate(epochs):g}"]
        return ["--oialr", "null", *muon, "--train.epochs", f"{epochs:g}", *FLIP]
    scale = epochs / EPOCHS
    delay, frequency = (str(round(scale * steps)) for steps in (DELAY, FREQUENCY))
    return ["--oialr.delay", delay, "--oialr.frequency", frequency, "--train.epochs", f"{epochs:g}", *FLIP]


def runs(times: Sequence[float]) -> list[tuple[str, float]]:
    """Side and epochs, both sides of one budget after each other."""
    return [pair for time in times for pair in (("OIALR", PER_DENSE_EPOCH * time), ("dense", time))]


def head(side: str, epochs: float, seed: int) -> Row:
    """What a run's row begins with, and is known by."""
    return {"run": side, "epochs": epochs, "seed": seed, "settings": " ".join(settings(side, epochs))}


def accuracies(rows: Sequence[Row]) -> dict[tuple[str, float], list[float]]:
    """Test accuracies in percent by side and epochs, in the order of the seeds."""
    found: dict[tuple[str, float], list[float]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        found.setdefault((row["run"], row["epochs"]), []).append(100 * row["test_accuracy"])
    return found


def trial(name: str) -> Row:
    """The same for one of the trials, which held-out images judge."""
    epochs, further = TRIALS[name]
    words = [*settings("OIALR", epochs), *further, "--data.validation", "5000"]
    return {"run": name, "epochs": epochs, "seed": 0, "settings": " ".join(words)}


def over_four_epochs(row: Row, dense: Row) -> float:
    """CPU time of a trial over that of four epochs of a dense run, had the trial all of the training images."""
    steps = row["epochs"] * dense["steps"] / dense["epochs"]
    return float(row["cpu_s"] / row["steps"] * steps / (4 * dense["cpu_s"] / dense["epochs"]))


def run(known: Row) -> Row:
    """Train as the head of a row says; the whole row."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        options = [*known["settings"].split(), "--train.seed", str(known["seed"]), "--train.evaluations", "6"]
        command = [sys.executable, "-c", CHILD, "train", "fashion_mnist_vit", *options, "--out", str(folder)]
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(options)} ended with {done.returncode}: {done.stderr[-2000:]}")
        return known | figures(folder, known["epochs"])


def figures(folder: Path, epochs: float) -> Row:
    """Of a finished run: accuracies, time, and the curve over epochs, of held-out images if there are any."""
    result = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    judged = [line for line in lines if "metric" in line]
    held_out = [line for line in judged if line["split"] == "validation"]
    found: Row = {"validation_accuracy": held_out[-1]["metric"]} if held_out else {}
    epoch = epochs / result["steps"]
    return found | {
        "test_accuracy": result["metric"],
        "cpu_s": result["wall_s"],
        "trained_share": result["trainable_params"] / result["dense_trainable_params"],
        "steps": result["steps"],
        "curve": [[epoch * line["step"], round(line["wall_s"], 1), line["metric"]] for line in held_out or judged],
    }


def main() -> None:
    """Run what is not in the file yet."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--times", type=float, nargs="+", default=TIMES, help="budgets, in dense epochs")
    parser.add_argument("--trials", action="store_true", help="long runs with further settings, instead")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="runs at once, each on one thread")
    options = parser.parse_args()
    file = RowFile(options.out, KEY)
    finished = {file.key(row) for row in file.rows()}
    if options.trials:
        wanted = [trial(name) for name in TRIALS]
    else:
        wanted = [head(*pair, seed) for seed in options.seeds for pair in runs(options.times)]
    with ThreadPoolExecutor(options.parallel) as pool:
        list(pool.map(lambda row: file.add(run(row)), (row for row in wanted if file.key(row) not in finished)))
    print_table([{key: row[key] for key in row if key not in ("curve", "settings")} for row in file.rows()])


if __name__ == "__main__":
    main()
