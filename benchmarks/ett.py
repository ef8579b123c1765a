"""Autoformer on ETT, dense and OIALR, beside the published errors: one row a run, ``oialr train autoformer_ett*``.

    python -m benchmarks.ett --data FOLDER --out benchmarks/results/ett.json
    python -m benchmarks.ett --data FOLDER --out FILE --parallel 12          # on one GPU
    python -m benchmarks.ett --data FOLDER --out FILE --size small --horizons 96 --budget 3600 --work FOLDER

``FOLDER`` holds ETTh1.csv and ETTh2.csv. As published, the reported error is that of the test months in the epoch of the
best validation error, which has to be the last of three without a better one or the tenth. Rows that are in the file are
not run again. After ``--budget`` seconds no run is begun, and one under way is stopped; with ``--work`` the next call
goes on with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from benchmarks.common import Row, arguments, earlier, finish, print_table

# Test MSE of Autoformer in arXiv 2205.13504, table 2, by horizon.
PUBLISHED = {
    "etth1": {96: 0.449, 192: 0.500, 336: 0.521, 720: 0.514},
    "etth2": {96: 0.358, 192: 0.456, 336: 0.482, 720: 0.515},
}
SIDES = {"dense": ["--dense"], "OIALR": [], "OIALR, published": ["--paper"]}
SIZES = {"published": [], "small": ["--model.dim", "64", "--model.mlp_dim", "256"]}
# What is in a row's place in the file.
KEY = ("dataset", "horizon", "run", "seed", "size")
STOPPED = 75


def run(key: Row, data: Path, work: Path, deadline: float | None) -> Row | None:
    """Train one row's run in a process of its own; None if it was stopped at the deadline."""
    folder = work / "_".join(str(value).replace(", ", "_") for value in key.values())
    recipe, settings = f"autoformer_{key['dataset']}", [*SIDES[key["run"]], *SIZES[key["size"]]]
    settings += ["--data.path", str(data), "--data.horizon", str(key["horizon"]), "--train.seed", str(key["seed"])]
    command = [sys.executable, "-m", "hpc_oialr", "train", recipe, *settings, "--out", str(folder), "--continue"]
    usage = os.times()
    stopped = False
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, said = process.communicate(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            stopped = True
            process.terminate()
            _, said = process.communicate()
    if stopped or process.returncode == STOPPED:
        return None
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {said[-2000:]}")
    now, result = os.times(), json.loads((folder / "summary.json").read_text())
    best = result["test_at_best"]
    return key | {
        "test_mse": best["mse"],
        "test_mae": best["mae"],
        "published_mse": PUBLISHED[key["dataset"]][key["horizon"]],
        "last_mse": result["metric"],
        "best_step": best["step"],
        "steps": result["steps"],
        "steps_of_ten_epochs": 10 * ((8640 - 96 - key["horizon"] + 1) // 32),
        "trained_share": result["trainable_params"] / result["dense_trainable_params"],
        "train_s": result["wall_s"],
        "cuda_graph": result["cuda_graph"],
        # Of this call alone; of several runs at once it is their sum.
        "cpu_s": now.children_user - usage.children_user + now.children_system - usage.children_system,
        "settings": " ".join([recipe, *SIDES[key["run"]], *SIZES[key["size"]]]),
    }


def main() -> None:
    """Run what is not in the file yet."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="folder of the CSV files")
    parser.add_argument("--datasets", nargs="+", choices=PUBLISHED, default=["etth1", "etth2"])
    parser.add_argument("--horizons", nargs="+", type=int, choices=PUBLISHED["etth1"], default=[96, 336])
    parser.add_argument("--runs", nargs="+", choices=SIDES, default=["dense", "OIALR"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--size", choices=SIZES, default="published", help="small: an eighth of the width")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="runs at once")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds after which runs are stopped")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="where run folders are kept; default: nowhere")
    options = parser.parse_args()
    rows, lock = earlier(options.out), Lock()
    deadline = None if options.budget is None else time.monotonic() + options.budget
    # One seed of everything before the next one.
    keys = [
        {"dataset": dataset, "horizon": horizon, "run": side, "seed": seed, "size": options.size}
        for seed in options.seeds
        for horizon in options.horizons
        for dataset in options.datasets
        for side in options.runs
    ]
    known = {tuple(row[name] for name in KEY) for row in rows}
    with tempfile.TemporaryDirectory() as scratch:

        def work(key: Row) -> None:
            if deadline is not None and time.monotonic() > deadline:
                return
            row = run(key, options.data.resolve(), options.work or Path(scratch), deadline)
            if row is not None:
                with lock:
                    rows.append(row)
                    finish(rows, options.out)

        with ThreadPoolExecutor(options.parallel) as pool:
            list(pool.map(work, [key for key in keys if tuple(key.values()) not in known]))
    print_table([{key: row[key] for key in row if key != "settings"} for row in rows])


if __name__ == "__main__":
    main()
