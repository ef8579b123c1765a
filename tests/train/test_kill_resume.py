"""kill -9 at random moments; every run resumes and ends with the bits of the undisturbed one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from support.spawn import free_port, launch_environment
from support.tiny_runs import write_recipe

ATTEMPTS = 3


@pytest.mark.parametrize("size", [1, 2])
def test_kill_and_resume(tmp_path, size):
    recipe = write_recipe(tmp_path, train={"steps": 120, "evaluations": 6}, checkpoint={"every": 3})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start = time.monotonic()
    _wait(_start(size, "train", str(recipe), "--out", str(whole)))
    duration = time.monotonic() - start
    _kill_after(
        _start(size, "train", str(recipe), "--out", str(killed)), killed, random.Random(size).random() * 2
    )
    for attempt in range(ATTEMPTS - 1):
        moment = random.Random(10 * size + attempt).random() * duration / 4
        _kill_after(_start(size, "resume", str(killed)), killed, moment)
    _wait(_start(size, "resume", str(killed)))
    expected, found = (json.loads((folder / "summary.json").read_text()) for folder in (whole, killed))
    assert found["weights_sha256"] == expected["weights_sha256"]
    assert found["metric"] == expected["metric"]
    assert found["r"] == expected["r"]


def _start(size, *command):
    port = free_port()
    processes = []
    for rank in range(size):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if size > 1:
            environment |= launch_environment(rank, size, port)
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "hpc_oialr", *command],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def _kill_after(processes, folder, seconds):
    """Kill one process or all so long after the run is under way; the others end by themselves or are killed too."""
    while not (folder / "config.yaml").exists() and processes[0].poll() is None:
        time.sleep(0.02)
    time.sleep(seconds)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate(timeout=60)


def _wait(processes):
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
