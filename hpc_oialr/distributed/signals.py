"""Signals that ask a run or a command to stop."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from hpc_oialr.errors import ConfigError

# Sent by a batch system before the end of a job; data loader processes ignore these, and Ctrl-C.
NAMES = ("USR2", "USR1", "TERM", "HUP")
_TWICE_S = 0.3  # one Ctrl-C may arrive twice within this time, from the terminal and from a launcher
_PR_SET_PDEATHSIG = 1


class SignalFlag:
    """The name of the signal received, or "". The first Ctrl-C calls ``interrupted``, the second one raises."""

    def __init__(self, interrupted: Callable[[], object] = lambda: None) -> None:
        self.name, self._interrupted, self._first = "", interrupted, 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Store the name; a checkpoint written here could interrupt a step or a collective."""
        name = signal.Signals(number).name.removeprefix("SIG")
        if name == self.name == "INT":
            if time.monotonic() - self._first >= _TWICE_S:
                raise KeyboardInterrupt
            return
        self.name = name
        if name == "INT":
            self._first = time.monotonic()
            self._interrupted()


@contextmanager
def catch_signals(names: Sequence[str], interrupted: Callable[[], object] = lambda: None) -> Iterator[SignalFlag]:
    """While active, signals set a flag instead of terminating the process; ``names``: of ``NAMES``, and "INT".

    A signal that the process was started to ignore (HUP under nohup, INT behind ``&``) stays ignored unless it is the
    first of the names. Outside the main thread, where Python allows no handlers, the flag is never set.
    """
    flag = SignalFlag(interrupted)
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    wanted = dict.fromkeys(name for name in names if name == names[0] or not _ignored(name))
    before = {_number(name): signal.signal(_number(name), flag) for name in wanted}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def unwind_upon(*names: str) -> None:
    """Let signals end the program by an exception, as Ctrl-C does, with exit code 128 + the signal's number.

    Cleans up partial files. A signal that the process was started to ignore stays ignored.
    """
    sys.unraisablehook = _raise_again
    for name in names:
        if not _ignored(name):
            signal.signal(_number(name), _unwind)


def _raise_again(lost: sys.UnraisableHookArgs) -> None:
    """A handler that runs inside a finalizer cannot end the program: Python prints its exception and continues."""
    if isinstance(lost.exc_value, (KeyboardInterrupt, SystemExit)):
        number = signal.SIGINT if isinstance(lost.exc_value, KeyboardInterrupt) else signal.SIGTERM
        threading.Timer(_TWICE_S, os.kill, (os.getpid(), number)).start()
    else:
        sys.__unraisablehook__(lost)


def _unwind(number: int, frame: FrameType | None) -> None:
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    if getattr(spec, "_initializing", False):
        # An exception inside torch's initialisation in C++ aborts the process.
        os._exit(128 + number)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def end_at_once_upon(*names: str) -> None:
    """Undo :func:`unwind_upon`: at the interpreter's end Python would print the exception."""
    for name in names:
        if signal.getsignal(_number(name)) is _unwind:
            signal.signal(_number(name), signal.SIG_DFL)


def leave_upon_term(code: int) -> None:
    """Exit with ``code`` upon TERM, until :func:`catch_signals` replaces the handler.

    srun ends the other tasks by TERM: if they died of the signal, it would report that instead of the first task's code.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))


def end_with_parent() -> None:
    """Let the kernel send TERM to this process when its parent dies; on Linux only."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def check_name(field: str, name: str) -> None:
    """Raise :class:`ConfigError` unless a run can be stopped by the signal of this name."""
    if name not in NAMES:
        fix = "USR2 is free for it; NCCL takes USR1."
        raise ConfigError(field, name, f"must be one of {', '.join(NAMES)}", fix=fix)


def _number(name: str) -> signal.Signals:
    return signal.Signals[f"SIG{name}"]


def _ignored(name: str) -> bool:
    return signal.getsignal(_number(name)) == signal.SIG_IGN
