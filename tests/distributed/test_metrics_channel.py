"""The channel over gloo, and under a real mpirun with the same bits."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.crowd import Crowd, Say
from support.mpi_program import ROUNDS, SLOTS
from support.mpirun import mpirun, needs_mpirun, python_environment

from hpc_oialr.distributed import World
from hpc_oialr.distributed.metric_reduction import MetricsChannel


def slots(rank: int) -> torch.Tensor:
    """One slot each process knows alone, one that nobody knows, one that all know."""
    vector = torch.full((6,), -math.inf, dtype=torch.float64)
    vector[rank], vector[5] = 0.1 * (rank + 1), rank / 3 - 1
    return vector


def exchange(rank: int, size: int, say: Say) -> None:
    world = World.from_environment(device="cpu", timeout_s=60)
    channel = MetricsChannel(world)
    vector = slots(rank)
    pending = channel.start(vector)
    vector.zero_()
    other = world.all_reduce(torch.ones(3))
    found = pending.result()
    again = channel.start(slots(rank)).result()
    say((channel.name, other.tolist(), found.tolist(), found.equal(again)))
    world.close()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gloo(size: int) -> None:
    with Crowd(exchange, size) as crowd:
        ends = [crowd.end(rank) for rank in range(size)]
    expected = [max(slots(rank)[i].item() for rank in range(size)) for i in range(6)]
    name = "single" if size == 1 else "gloo"
    assert ends == [(0, (name, [float(size)] * 3, expected, True))] * size


def results(folder: Path, size: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


@needs_mpirun
def test_mpi_and_gloo_give_the_same_bits(tmp_path: Path) -> None:
    size = 3
    ran = mpirun(size, "-m", "support.mpi_program", "channels", str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    found = results(tmp_path, size)
    assert {row["channel"] for row in found} == {"mpi"}
    assert {row["other"] for row in found} == {"gloo"}
    assert all(row["equal"] for row in found)
    assert all(row["seen"] == found[0]["seen"] for row in found)
    assert torch.tensor(found[0]["seen"]).shape == (ROUNDS, 2, SLOTS)


@needs_mpirun
def test_a_process_that_hangs_ends_mpi_after_the_timeout(tmp_path: Path) -> None:
    ran = mpirun(2, "-m", "support.mpi_program", "stop", str(tmp_path))
    assert ran.returncode != 0
    told = json.loads((tmp_path / "0.json").read_text())
    assert "the metrics' all-reduce over MPI failed; every rank must take part" in told["error"]
    assert "(no answer within 3 s)" in told["error"]
    assert 2.5 < told["waited"] < 30


@needs_mpirun
def test_an_end_of_mpi_that_waits_for_a_lost_process_is_cut_short(tmp_path: Path) -> None:
    ran = mpirun(2, "-m", "support.mpi_program", "linger", str(tmp_path), timeout_s=50)
    assert ran.returncode == 1, "not the 0 of a process that has ended MPI"
    assert (tmp_path / "0.json").read_text() == "{}"


def test_mpi_is_not_touched_outside_of_it() -> None:
    """Neither by importing everything, nor by opening a channel, nor by leaving."""
    code = (
        "import sys, torch, hpc_oialr.train.run; from hpc_oialr.distributed import World, open_channel, mpi;"
        "c = open_channel(World.single('cpu')); c.close(); mpi.leave_mpi();"
        "sys.exit(any(name.startswith('mpi4py') for name in sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], env=python_environment(), check=False)
    assert ran.returncode == 0
