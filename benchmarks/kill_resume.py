"""Kill -9 at random moments, resume, and compare with the undisturbed run, bit for bit.

The recipe's own code path with a smaller model and a checkpoint every third step, so that steps,
updates and the writing of checkpoints are all hit. One process and two (under torchrun), one of them
killed or all. A resumed run is compared in its weights (sha256), its losses, and its spectra. Goes on where
it was interrupted, until `--moments` kills have met a run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Row, arguments, earlier, finish
from hpc_oialr.spectra import open as open_spectra

SETTINGS = [
    "--model.dim", "64", "--train.steps", "60", "--data.limit", "6000", "--train.global_batch", "64",
    "--train.evaluations", "2", "--oialr.delay", "9", "--oialr.frequency", "7", "--checkpoint.every", "3",
    "--record.every", "1",
]  # fmt: skip


TOO_LATE = "finished before the kill"


def command(processes: int, *words: str) -> list[str]:
    """The command line of a run on this many processes."""
    module = ["-m", "hpc_oialr", *words]
    if processes == 1:
        return [sys.executable, *module]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    return [*launcher, *module]


def start(processes: int, *words: str) -> subprocess.Popen[bytes]:
    """Start a run in a process group of its own, one thread a process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command(processes, *words), env=environment, start_new_session=True, **quiet)


def outcome(folder: Path) -> dict[str, Any]:
    """What must be equal: weights, losses by step, spectra."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(row["step"], row.get("loss"), row.get("metric")) for row in rows]
    with open_spectra(folder) as layers:
        spectra = {name: [layer.singular_values.tobytes(), list(layer.r)] for name, layer in layers.items()}
    weights = json.loads((folder / "summary.json").read_text())["weights_sha256"]
    return {"weights": weights, "losses": losses, "spectra": spectra}


def workers(folder: Path) -> list[int]:
    """Process ids of the run's training processes; torchrun gives each a session of its own."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,args="], capture_output=True, text=True, check=True)
    lines = [line.split(None, 1) for line in listed.stdout.splitlines()]
    return [int(pid) for pid, line in lines if str(folder) in line and "torch.distributed.run" not in line]


def interrupted(processes: int, kill_all: bool, folder: Path, after_s: float) -> str:
    """Start a run, kill it ``after_s`` seconds after its first step; what it was doing."""
    run = start(processes, "train", "fashion_mnist_vit", *SETTINGS, "--out", str(folder))
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and run.poll() is None:
        time.sleep(0.01)
    time.sleep(after_s)
    if run.poll() is not None:
        return TOO_LATE
    if kill_all and processes > 1:
        os.kill(run.pid, signal.SIGKILL)
    for pid in workers(folder)[: None if kill_all else 1]:
        os.kill(pid, signal.SIGKILL)
    run.wait(timeout=120)
    drafts = [p for p in (folder / "checkpoints").iterdir() if not p.name.startswith("step_")]
    doing = "writing a checkpoint" if drafts else "between checkpoints"
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if line.endswith("}")]
    return f"step {max(steps, default=0)}, {doing}"


def main() -> None:
    """All moments."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = earlier(options.out)
    chance = random.Random(f"{options.seed} {len(rows)}")
    with tempfile.TemporaryDirectory() as scratch:
        expected, seconds = {}, {}
        for processes in (1, 2):
            folder = Path(scratch) / f"undisturbed-{processes}"
            start(processes, "train", "fashion_mnist_vit", *SETTINGS, "--out", str(folder)).wait()
            expected[processes] = outcome(folder)
            summary = json.loads((folder / "summary.json").read_text())
            seconds[processes] = sum(summary[key] for key in ("wall_s", "eval_wall_s", "checkpoint_wall_s"))
        while sum(row["at"] != TOO_LATE for row in rows) < options.moments:
            moment = len(rows)
            processes, kill_all = (1, True) if moment % 2 else (2, bool(moment % 4))
            after_s = chance.uniform(0, 0.9) * seconds[processes]
            folder = Path(scratch) / f"run-{moment}"
            rows.append(one(processes, kill_all, folder, after_s, expected[processes]))
            finish(rows, options.out)
    finish(rows, options.out)
    if not all(row["equal"] for row in rows):
        sys.exit("a resumed run differs from the undisturbed one")


def one(processes: int, kill_all: bool, folder: Path, after_s: float, expected: dict[str, Any]) -> Row:
    """Kill, resume, compare."""
    at = interrupted(processes, kill_all, folder, after_s)
    code = start(processes, "resume", str(folder)).wait()
    equal = code == 0 and outcome(folder) == expected
    return {
        "processes": processes,
        "killed": "all" if kill_all else "one",
        "at": at,
        "exit": code,
        "equal": equal,
    }


if __name__ == "__main__":
    main()
