"""Processes that start in milliseconds, form a gloo group, and may be killed or stopped."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from support.fork_server import fork_context, settle
from support.spawn import free_port, launch_environment

_ENDING_S = 60.0

Say = Callable[[Any], None]


class Crowd:
    """``fn(rank, size, say, *args)`` in each of ``size`` processes; ``say`` sends a message to the test.

    ``fn`` must be a function of a module. Variables are set as torchrun does. An error of a process is
    its last message, as text. Use it in a ``with`` statement: no process outlives it.
    """

    def __init__(self, fn: Callable[..., None], size: int, *args: Any) -> None:
        context = fork_context()
        port, pipes = free_port(), [context.Pipe(duplex=False) for _ in range(size)]
        self.ears = [ear for ear, _ in pipes]
        self.processes = [
            context.Process(target=_child, args=(rank, fn, size, port, mouth, args))
            for rank, (_, mouth) in enumerate(pipes)
        ]
        for process, (_, mouth) in zip(self.processes, pipes, strict=True):
            process.start()
            mouth.close()

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def hear(self, rank: int) -> Any:
        """The next message of a process."""
        assert self.ears[rank].poll(_ENDING_S), f"process {rank} says nothing"
        return self.ears[rank].recv()

    def strike(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one process."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def end(self, rank: int, within_s: float = _ENDING_S) -> tuple[int | None, Any]:
        """Exit code and last message of a process that ends by itself."""
        self.processes[rank].join(within_s)
        assert not self.processes[rank].is_alive(), f"process {rank} hangs"
        last = None
        try:
            while self.ears[rank].poll():
                last = self.ears[rank].recv()
        except EOFError:
            pass
        return self.processes[rank].exitcode, last


def oialr(rank: int, size: int, say: Say, log: str, *words: str) -> None:
    """The command line tool itself; what it writes on standard error goes to ``LOG.RANK``."""
    from hpc_oialr.cli.main import entry

    file = os.open(f"{log}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    warnings.resetwarnings()
    sys.argv = ["oialr", *words]
    entry()


def _child(rank: int, fn: Callable[..., None], size: int, port: int, mouth: Connection, args: tuple[Any, ...]) -> None:
    os.environ.update(launch_environment(rank, size, port))
    settle()
    code = 0
    try:
        fn(rank, size, mouth.send, *args)
    except Exception as error:
        mouth.send(f"{type(error).__name__}: {error}")
        code = 1
    os._exit(code)
