"""Identify a process so that another one, on this host or elsewhere, can check whether it still runs."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

from hpc_oialr.commands import run_command
from hpc_oialr.distributed.environment import node_name

_PR_SET_PDEATHSIG = 1


def process_space() -> str:
    """What processes must share to see each other under the same numbers: the running kernel and its namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return node_name()


def started(pid: int) -> str:
    """When a process of this space was started, exactly enough to tell it from a later one of its number.

    "" if there is no such process, or only the entry of a dead one.
    """
    try:
        # The name, in parentheses, may hold anything.
        fields = Path("/proc", str(pid), "stat").read_text(errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
        return run_command(["ps", "-o", "lstart=", "-p", str(pid)], timeout_s=10).stdout.strip()


def end_with_parent() -> None:
    """Let the kernel send TERM to this process when its parent dies; on Linux only."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
