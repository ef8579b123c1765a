"""What tests start under mpirun: one deed in every process.

    mpirun -n N python -m support.mpi_program channels FOLDER
    mpirun -n N python -m support.mpi_program stop FOLDER      (the last process stops itself)
    mpirun -n N python -m support.mpi_program linger FOLDER    (the last process never ends MPI)
    mpirun -n N python -m support.mpi_program place FOLDER     (the start-up check only)

Each process writes ``FOLDER/RANK.json``.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hpc_oialr.distributed import World, open_channel
from hpc_oialr.distributed.metric_reduction import MetricsChannel
from hpc_oialr.distributed.mpi import leave_mpi
from hpc_oialr.errors import WorldError

SLOTS, ROUNDS = 1000, 5


def channels(world: World, channel: MetricsChannel) -> dict[str, Any]:
    """Rounds of vectors with -inf, tiny, huge and negative numbers over both channels."""
    other, seen = MetricsChannel(world), []
    generator = torch.Generator().manual_seed(world.rank)
    for _ in range(ROUNDS):
        vector = torch.randn(SLOTS, dtype=torch.float64, generator=generator).exp() - 1
        vector[torch.rand(SLOTS, generator=generator) < 0.5] = -torch.inf
        first, second = channel.start(vector), other.start(vector)
        world.barrier()
        vector.zero_()
        seen.append([pending.result().view(torch.int64).tolist() for pending in (first, second)])
    return {"channel": channel.name, "other": other.name, "equal": all(a == b for a, b in seen), "seen": seen}


def stop(world: World, channel: MetricsChannel) -> dict[str, Any]:
    """The last process stops itself; the others must see an error after the timeout."""
    vector = torch.zeros(4, dtype=torch.float64)
    channel.start(vector).result()
    if world.rank == world.size - 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    start = time.monotonic()
    try:
        channel.start(vector).result()
    except WorldError as error:
        return {"error": str(error), "waited": time.monotonic() - start}
    return {"error": None}


def linger(world: World, channel: MetricsChannel) -> dict[str, Any]:
    """The last process sleeps instead of ending MPI; the others leave hard."""
    if world.rank == world.size - 1:
        time.sleep(60)
    (Path(sys.argv[2]) / f"{world.rank}.json").write_text("{}")
    leave_mpi(within_s=1.0)
    return {"ended": True}


DEEDS = {"place": lambda *_: {}, "channels": channels, "stop": stop, "linger": linger}


def main() -> None:
    """Join, do one thing, leave."""
    what, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    world = World.from_environment(device="cpu", timeout_s=120.0)
    try:
        channel = open_channel(replace(world, timeout_s=3.0) if what == "stop" else world)
        result = DEEDS[what](world, channel)
    except WorldError as error:
        result = {"refused": str(error)}
    (folder / f"{world.rank}.json").write_text(json.dumps(result))
    code = 1 if result.get("error") or result.get("refused") else 0
    if code == 0:
        channel.close()
        # As the interpreter does at its end, without the rest of that end, which gloo's threads may disturb.
        atexit._run_exitfuncs()
    os._exit(code)


if __name__ == "__main__":
    main()
