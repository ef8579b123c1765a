"""``oialr search`` as a command that is killed without a word and called again."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from support.mpirun import HERE

SPACE = """
space:
  optimizer.lr: {kind: float, range: [1e-3, 1e-1], log: true}
  oialr.rule.fraction: {kind: choice, values: [0.25, 0.5]}
"""
PATIENCE_S = 600.0


def search(words: Sequence[str], environ: Mapping[str, str], cwd: Path) -> subprocess.Popen[str]:
    """Start the command."""
    command = [sys.executable, "-u", "-m", "hpc_oialr", "search", *words]
    pipe = subprocess.PIPE
    path = {**environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=path, cwd=cwd, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def kill_once(running: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    """Kill the command once something has happened."""
    give_up = time.monotonic() + PATIENCE_S
    while not happened():
        assert running.poll() is None, running.communicate()[0]
        assert time.monotonic() < give_up
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGKILL)
    # Local runs hold the pipe for longer.
    running.wait()
    assert running.stdout is not None
    running.stdout.close()


def finished(folder: Path) -> list[Path]:
    """Summaries of the trials that came to their end."""
    return sorted(folder.glob("trial_*/summary.json"))


def table_of(folder: Path) -> list[dict[str, str]]:
    """``trials.csv``."""
    return list(csv.DictReader((folder / "trials.csv").read_text().splitlines()))
