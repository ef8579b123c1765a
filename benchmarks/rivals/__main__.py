"""OIALR, dense training and the low-rank methods a user could pick instead: metric, time and memory, one row a run.

    python -m benchmarks.rivals --data FOLDER --out FILE --mode tune test time --parallel 14 --budget 70 90 60
    python -m benchmarks.rivals --data FOLDER --out FILE --mode tune --problems cifar_vit --sides OIALR Spectron

``FOLDER`` holds the CIFAR-10 archives, ETTh1.csv and, where the package's cache lacks them, folders fashion-mnist and
python-docs. Modes: "tune" is the grid of rates, the same for all sides, judged by held-out training data. "test" is
every side at its best rate in the file, at several lengths, judged by test data. "time" is every problem and side alone,
a hundred steps of its whole life, for the times that runs side by side cannot have; a run of n steps takes n times the
mean of ``phases``, and ``events_s`` once. Runs that are in the file are not run again.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks.rivals.jobs import KEY, TIMED_STEPS, Job, Setting, Workers, best_rates, testing, timing, tuning
from benchmarks.rivals.problems import PROBLEMS
from benchmarks.rivals.sides import SIDES
from benchmarks.rivals.summary import print_summary
from benchmarks.row_file import Row, RowFile


def main() -> None:
    """Run what is not in the file yet."""
    options = _options()
    setting = Setting(
        options.device, options.data.resolve() if options.data else None, options.tiny, options.evaluations,
        options.threads, options.timed_steps,
    )  # fmt: skip
    if "cifar_vit" in options.problems and not options.tiny:
        # Decoded once, into the cache, not by every process.
        PROBLEMS["cifar_vit"].load(setting.data, "test")
        print("CIFAR-10 is in the cache", flush=True)
    file, workers = RowFile(options.out, KEY), Workers(setting, options.parallel)
    budgets = [*options.budget, *[None] * len(options.mode)]
    missing = {name: SIDES[name].missing for name in options.sides if SIDES[name].missing}
    for name, why in missing.items():
        print(f"left out: {name}: {why}", flush=True)
    sides = [name for name in options.sides if name not in missing]
    try:
        for mode, seconds in zip(options.mode, budgets, strict=False):
            best = best_rates(file.rows())
            jobs = {
                "tune": lambda: tuning(options.problems, sides),
                "test": lambda best=best: testing(options.problems, sides, best, options.lengths, options.seeds),
                "time": lambda best=best: timing(options.problems, sides, best),
            }[mode]()
            _do(mode, jobs, workers, file, seconds)
    finally:
        workers.close()
    print_summary(file.rows())


def _do(mode: str, jobs: list[Job], workers: Workers, file: RowFile, seconds: float | None) -> None:
    start = time.time()
    finished = [row for row in file.every_row() if _is_finished(row)]
    known = {file.key(row) for row in finished}
    todo = [job for job in jobs if file.key(workers.setting.head(job)) not in known]
    print(f"{mode}: {len(todo)} runs, {len(jobs) - len(todo)} are in the file", flush=True)

    def keep(row: Row) -> None:
        if "left_out" in row:
            left.append(row)
            return
        file.add(row)
        found = row.get("failed") or f"{_text(row['metric'])} in {row['train_s']:.1f} s"
        name = f"{row['problem']}, {row['side']}, rate {row['rate']:g}, budget {row['budget']:g}, seed {row['seed']}"
        print(f"{time.time() - start:6.1f} s  {mode}: {name}: {found}", flush=True)

    left: list[Row] = []
    if mode == "time":
        # In a process of its own; the others are gone.
        workers.close()
        workers = Workers(workers.setting, 1)
    workers.do(todo, keep, seconds, alone=mode == "time")
    if mode == "time":
        workers.close()
    if left:
        print(f"{mode}: {len(left)} runs left out for want of time", flush=True)


def _text(value: float | None) -> str:
    return "timed" if value is None else f"{value:.4f}"


def _is_finished(row: Row) -> bool:
    """A run that diverged would diverge again."""
    return "left_out" not in row and str(row.get("failed", "diverged")).startswith("diverged")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON), added to")
    parser.add_argument("--mode", nargs="+", choices=("tune", "test", "time"), default=["tune", "test", "time"])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument(
        "--lengths", nargs="+", type=float, default=[1.0, 2.0, 0.5], help="of test runs, over the reference"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="processes")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--budget", nargs="+", type=float, default=[], metavar="S", help="seconds of each mode")
    parser.add_argument("--evaluations", type=int, default=8)
    parser.add_argument("--timed-steps", type=int, default=TIMED_STEPS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small models, made-up data, a few steps")
    options = parser.parse_args()
    if options.data is not None and not options.data.is_dir():
        sys.exit(f"error: --data {options.data} is not a folder")
    return options


if __name__ == "__main__":
    main()
