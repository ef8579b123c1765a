"""Run a test's function in several fresh processes that can make a gloo group."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.fork_server import fork_context, settle


def spawn(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call ``fn(rank, world_size, *args)`` in each process; what they return, in order of rank.

    ``fn`` must be a function of a module, not a nested one. RANK, WORLD_SIZE and the rest are set as
    torchrun does, so that ``World.from_environment()`` works; each process has one thread. The first
    error of any process is raised here. Warnings are errors there too.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (fn, world_size, free_port(), folder, args)
        mp.start_processes(_child, arguments, world_size, start_method=fork_context().get_start_method())
        return [torch.load(_result(folder, rank), weights_only=False) for rank in range(world_size)]


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def launch_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun sets for processes of one node."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _child(rank: int, fn: Callable[..., Any], world_size: int, port: int, folder: str, args: tuple[Any, ...]) -> None:
    os.environ.update(launch_environment(rank, world_size, port))
    settle()
    result = fn(rank, world_size, *args)
    torch.save(result, _result(folder, rank))
    if dist.is_initialized():
        dist.destroy_process_group()
    # What still refers to the group keeps gloo's threads alive, and ending the interpreter under them
    # now and then aborts the process (pytorch/pytorch pull request 179291).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"{rank}.pt"
