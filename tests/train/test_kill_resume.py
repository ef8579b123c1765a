"""kill -9 at random moments; every run resumes and ends with the bits of the undisturbed one."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from support.crowd import Crowd, oialr
from support.tiny_runs import write_recipe

ATTEMPTS = 3


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.long), 2])
def test_kill_and_resume(tmp_path: Path, size: int) -> None:
    checkpoints = {"every": 3, "asynchronous": True}
    recipe = str(write_recipe(tmp_path, train={"steps": 40, "evaluations": 3}, checkpoint=checkpoints))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    duration = finish(size, "train", recipe, "--out", str(whole))
    chance = random.Random(size)
    for attempt in range(ATTEMPTS):
        words = ("resume", str(killed)) if attempt else ("train", recipe, "--out", str(killed))
        kill_after(chance.random() * duration / 2, size, killed, words)
    finish(size, "resume", str(killed))
    expected, found = (json.loads((folder / "summary.json").read_text()) for folder in (whole, killed))
    assert found["weights_sha256"] == expected["weights_sha256"]
    assert found["metric"] == expected["metric"]
    assert found["r"] == expected["r"]


def finish(size: int, *words: str) -> float:
    """Seconds that a command takes which all processes end by themselves."""
    log, start = words[-1] + ".log", time.monotonic()
    with Crowd(oialr, size, log, *words) as crowd:
        for rank in range(size):
            code, _ = crowd.end(rank, within_s=300)
            assert code == 0, Path(f"{log}.{rank}").read_text()
    return time.monotonic() - start


def kill_after(seconds: float, size: int, folder: Path, words: tuple[str, ...]) -> None:
    """Kill all processes so long after the run has its folder."""
    with Crowd(oialr, size, f"{folder}.log", *words) as crowd:
        while not (folder / "config.yaml").exists() and crowd.processes[0].is_alive():
            time.sleep(0.005)
        time.sleep(seconds)
