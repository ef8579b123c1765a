"""Signals set a flag and do nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from hpc_oialr.distributed import signals
from hpc_oialr.distributed.signals import catch_signals


def test_a_signal_sets_the_flag_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGUSR2), signal.getsignal(signal.SIGTERM)
    with catch_signals(("USR2", "TERM")) as flag:
        assert flag.name == ""
        os.kill(os.getpid(), signal.SIGUSR2)
        assert flag.name == "USR2"
    assert (signal.getsignal(signal.SIGUSR2), signal.getsignal(signal.SIGTERM)) == before


def test_in_another_thread_there_is_no_handler():
    seen = []

    def work():
        with catch_signals(("USR2",)) as flag:
            seen.append((flag.name, signal.getsignal(signal.SIGUSR2)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [("", signal.getsignal(signal.SIGUSR2))]


def test_ctrl_c_once_and_twice(monkeypatch):
    """One that comes from the terminal and from the launcher too is one."""
    told = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with catch_signals(("USR2", "INT"), lambda: told.append("once")) as flag:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            assert (flag.name, told) == ("INT", ["once"])
            monkeypatch.setattr(signals, "_TWICE_S", 0.0)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_was_to_be_ignored_still_is():
    """As by nohup; but the signal of the settings, which comes first, is heeded."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catch_signals(("USR2", "HUP")) as flag:
            os.kill(os.getpid(), signal.SIGHUP)
            assert flag.name == ""
        with catch_signals(("HUP", "USR2")) as flag:
            os.kill(os.getpid(), signal.SIGHUP)
            assert flag.name == "HUP"
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


UNWINDING = {
    "in code": ("import time; time.sleep(20)", "undone"),
    "in a finalizer, which swallows exceptions": (
        "class Last:\n    def __del__(self):\n        import time; time.sleep(0.5)\nlast = Last(); del last\n"
        "import time; time.sleep(20)",
        "undone",
    ),
    "while torch starts, whose C++ aborts upon an exception": (
        "import time, types; sys.modules['torch'] = types.ModuleType('torch')\n"
        "sys.modules['torch'].__spec__ = types.SimpleNamespace(_initializing=True); time.sleep(20)",
        "",
    ),
}


@pytest.mark.parametrize("name", ["INT", "TERM"])
@pytest.mark.parametrize("where", UNWINDING)
def test_a_signal_undoes_what_is_half_done_and_is_no_traceback(where, name):
    body, undone = UNWINDING[where]
    code = (
        "import sys\nfrom hpc_oialr.distributed.signals import unwind_upon\nunwind_upon('INT', 'TERM')\ntry:\n"
        f"    print('ready', flush=True)\n{textwrap.indent(body, '    ')}\n"
        "except KeyboardInterrupt:\n    sys.exit(130)\nfinally:\n    print('undone', flush=True)\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as program:
        assert program.stdout.readline() == "ready\n"
        time.sleep(0.2)
        program.send_signal(signal.Signals[f"SIG{name}"])
        said, errors = program.communicate(timeout=60)
    assert (program.returncode, said.strip(), errors) == (128 + signal.Signals[f"SIG{name}"], undone, "")
