"""Signals set a flag and do nothing else."""

from __future__ import annotations

import os
import signal
import threading

from hpc_oialr.processes.signals import heed


def test_a_signal_sets_the_flag_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGUSR2), signal.getsignal(signal.SIGTERM)
    with heed(("USR2", "TERM")) as flag:
        assert flag.name == ""
        os.kill(os.getpid(), signal.SIGUSR2)
        assert flag.name == "USR2"
    assert (signal.getsignal(signal.SIGUSR2), signal.getsignal(signal.SIGTERM)) == before


def test_in_another_thread_there_is_no_handler():
    seen = []

    def work():
        with heed(("USR2",)) as flag:
            seen.append((flag.name, signal.getsignal(signal.SIGUSR2)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [("", signal.getsignal(signal.SIGUSR2))]
