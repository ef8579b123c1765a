"""A function in several fresh processes of one thread each, and the engines they may train under."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from benchmarks.common import Row
from hpc_oialr.distributed import World
from hpc_oialr.engines import DDP, FSDP, DeepSpeed, EngineConfig, TensorParallel

ENGINES: dict[str, Callable[[], EngineConfig]] = {
    "ddp": DDP,
    "fsdp": FSDP,
    "tensor": TensorParallel,
    "zero1": lambda: DeepSpeed(stage=1),
    "zero2": lambda: DeepSpeed(stage=2),
    "zero3": lambda: DeepSpeed(stage=3),
}


def on_processes(size: int, function: Callable[..., Row], *args: Any) -> list[Row]:
    """What ``function(*args)``, of a module, returns in each process; it joins the others by a World."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_child, args=(size, free_port(), folder, function, args), nprocs=size)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(size)]


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _child(rank: int, size: int, port: int, folder: str, function: Callable[..., Row], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
                   "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    torch.save(function(*args), Path(folder) / f"{rank}.pt")
    World.current().barrier()
    time.sleep(0.5)
    # Ending the interpreter under gloo's threads now and then aborts the process.
    os._exit(0)
