"""Low-rank convolutions, flattened and in Tucker form, and dense ones: accuracy and time on Fashion-MNIST.

Every run is a short `oialr train fashion_mnist_convnet` in a process with one thread; the recipe's conversion and
updates are at the same shares of it. The training clock counts processor seconds (evaluations and the start left out);
all forms run at the same time, so that other work on the machine slows them alike. Both forms keep the recipe's share
of k, Tucker's of both channel modes. Interrupted calls go on where they stopped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.budgets import CHILD
from benchmarks.common import Row, arguments, earlier, finish

RUNS: dict[str, list[str]] = {
    "dense": ["--oialr", "null"],
    "flattened, bases by inputs": [],
    "Tucker": ["--oialr.conv", "tucker"],
    "flattened, bases by weights": ["--oialr.importance", "weights"],
    "flattened, k/2, bases by inputs": ["--oialr.rule.fraction", "0.5"],
    "Tucker, k/8": ["--oialr.conv", "tucker", "--oialr.rule.fraction", "0.125"],
}
# Images are not enlarged, so that all forms take minutes.
LENGTH = ["--train.steps", "300", "--train.global_batch", "64", "--model.image_size", "28"]


def run(name: str, seed: int) -> Row:
    """Train one form."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        options = [*LENGTH, "--train.evaluations", "1", "--train.seed", str(seed), "--out", str(folder)]
        command = [sys.executable, "-c", CHILD, "train", "fashion_mnist_convnet", *RUNS[name], *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name} ended with {done.returncode}: {done.stderr[-2000:]}")
        result = json.loads((folder / "summary.json").read_text())
    return {
        "run": name,
        "seed": seed,
        "test_accuracy": result["metric"],
        "cpu_s": result["wall_s"],
        "trained": result["trainable_params"],
        "trained_share": result["trainable_params"] / result["dense_trainable_params"],
        "peak_memory_gib": result["peak_memory_gib"],
        "steps": result["steps"],
        "settings": " ".join(RUNS[name]),
    }


def main() -> None:
    """Run what is not in the file yet."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", default=list(RUNS), help="names of forms")
    options = parser.parse_args()
    rows = earlier(options.out)
    done = {(row["run"], row["seed"]) for row in rows}
    for seed in options.seeds:
        wanted = [name for name in options.only if (name, seed) not in done]
        with ThreadPoolExecutor(max_workers=len(RUNS)) as pool:
            rows += pool.map(lambda name, seed=seed: run(name, seed), wanted)
        finish(rows, options.out)


if __name__ == "__main__":
    main()
