"""torchrun restarts its processes in the same job when one dies; the run goes on from its last checkpoint."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.mpirun import HERE
from support.spawn import spawn
from support.tiny_runs import write_recipe
from support.train_workers import train_worker

PATIENCE_S = 300.0


@pytest.mark.long
@pytest.mark.slow
def test_a_killed_process_costs_no_bit(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train={"steps": 48, "evaluations": 2}, checkpoint={"every": 6})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    spawn(train_worker, 2, str(recipe), str(whole))
    launcher = run(recipe, killed)
    until(lambda: [*(killed / "checkpoints").glob("step_*")], launcher)
    # Rank 0 holds the folder, and writes everything.
    os.kill(process_of_rank(launcher.pid, 0), signal.SIGKILL)
    assert launcher.wait(PATIENCE_S) == 0, said(killed)
    assert "(exitcode: -9) local_rank: 0" in said(killed)
    expected, found = (json.loads((folder / "summary.json").read_text()) for folder in (whole, killed))
    assert found["world_size"] == 2
    assert found["weights_sha256"] == expected["weights_sha256"]
    assert found["metric"] == expected["metric"]


def run(recipe: Path, folder: Path) -> subprocess.Popen[bytes]:
    """Start a run as docs/guide.md says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2"]
    words = [*launcher, f"--master-port={port}", "-m", "hpc_oialr", "train", recipe, "--out", folder, "--continue"]
    environ = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    with Path(f"{folder}.log").open("wb") as log:
        return subprocess.Popen(list(map(str, words)), env=environ, stdout=log, stderr=subprocess.STDOUT)


def said(folder: Path) -> str:
    return Path(f"{folder}.log").read_text()


def until(happened, launcher: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not happened():
        assert launcher.poll() is None
        assert time.monotonic() < give_up
        time.sleep(0.02)


def process_of_rank(launcher: int, rank: int) -> int:
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"torchrun has no process of rank {rank}")
