"""A process killed (-9) or stopped (SIGSTOP) under every engine: the others leave in time, and the run resumes.

Two processes under torchrun, the recipe's own code path with a smaller model (`benchmarks.kill_resume`'s), the
last one struck at a random moment between its first and last step. `left_s`: seconds until the other one has ended
by itself, after a stop at least `--timeout`, torchrun's own end included; `said`: whether its log names the lost
process and what to do. The resumed run is compared with the undisturbed one in its weights, losses and spectra.
Goes on where it was interrupted.
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
from benchmarks.kill_resume import SETTINGS, command, outcome, workers
from benchmarks.worlds import ENGINES

ADAMW = ["--optimizer", "AdamW", "--optimizer.lr", "5e-4"]
STRIKES = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
RECIPE = "fashion_mnist_vit"
RULE = "Another one has died or "


def settings(engine: str, timeout_s: float) -> list[str]:
    """Of a run under this engine."""
    optimizer = ADAMW if engine.startswith("zero") else []
    return [*SETTINGS, *optimizer, *ENGINES[engine], "--train.timeout_s", str(timeout_s)]


def start(log: Path, *words: str) -> subprocess.Popen[bytes]:
    """A run of two processes; what they write goes to a file."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        return subprocess.Popen(command(2, *words), env=environment, start_new_session=True, stdout=file, stderr=file)


def undisturbed(engine: str, timeout_s: float, folder: Path) -> tuple[dict[str, Any], float]:
    """What a resumed run must equal, and how long its steps took (s)."""
    if start(Path(f"{folder}.log"), "train", RECIPE, *settings(engine, timeout_s), "--out", str(folder)).wait():
        raise SystemExit(f"the undisturbed run under {engine} failed: {Path(f'{folder}.log').read_text()[-2000:]}")
    summary = json.loads((folder / "summary.json").read_text())
    return outcome(folder), sum(summary[key] for key in ("wall_s", "eval_wall_s", "checkpoint_wall_s"))


def struck(engine: str, strike: str, timeout_s: float, folder: Path, after_s: float) -> Row:
    """Strike the last process ``after_s`` seconds after the first step, and wait for the other's end."""
    log, metrics = Path(f"{folder}.log"), folder / "metrics.jsonl"
    run = start(log, "train", RECIPE, *settings(engine, timeout_s), "--out", str(folder))
    while not (metrics.exists() and metrics.stat().st_size) and run.poll() is None:
        time.sleep(0.01)
    time.sleep(after_s)
    victims = workers(folder)
    if run.poll() is not None or not victims:
        return {"engine": engine, "strike": strike, "at": None}
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if line.endswith("}")]
    os.kill(victims[-1], STRIKES[strike])
    begin = time.monotonic()
    run.wait(timeout=600)
    said = RULE in log.read_text(errors="replace")
    return {
        "engine": engine,
        "strike": strike,
        "at": f"step {max(steps)}",
        "left_s": time.monotonic() - begin,
        "said": said,
    }


def main() -> None:
    """Every engine, killed and stopped."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--timeout", type=float, default=20.0, help="train.timeout_s of the runs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = earlier(options.out)
    done = {(row["engine"], row["strike"]) for row in rows}
    with tempfile.TemporaryDirectory() as scratch:
        for engine in options.engines:
            left = [strike for strike in STRIKES if (engine, strike) not in done]
            if not left:
                continue
            expected, seconds = undisturbed(engine, options.timeout, Path(scratch) / engine)
            for strike in left:
                folder = Path(scratch) / f"{engine}-{strike}"
                after_s = random.Random(f"{options.seed} {engine} {strike}").uniform(0, 0.7) * seconds
                row = struck(engine, strike, options.timeout, folder, after_s)
                code = start(Path(f"{folder}.resumed.log"), "resume", str(folder)).wait()
                row |= {"exit": code, "equal": code == 0 and outcome(folder) == expected}
                rows.append(row)
                finish(rows, options.out, timeout_s=options.timeout)
    if not all(row["equal"] and (row["at"] is None or row["said"]) for row in rows):
        sys.exit("a run did not say why it left, or differs from the undisturbed one after resuming")


if __name__ == "__main__":
    main()
