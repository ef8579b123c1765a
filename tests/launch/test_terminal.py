"""A run at a terminal: Ctrl-C, and a window that is closed."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import termios

import pytest
from support.tiny_runs import write_recipe

from hpc_oialr.record.run_folder import RunFolder


def _as_in_a_login() -> None:
    """The terminal controls it, and what pytest was perhaps started to ignore is not ignored."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Terminal:
    """A program in a terminal of its own; its output is in :attr:`said`."""

    def __init__(self, *command: str) -> None:
        self.master, slave = os.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_as_in_a_login,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        )
        os.close(slave)
        self.said = ""

    def read(self) -> bool:
        """What is said next; False once all has been said."""
        try:
            text = os.read(self.master, 65_536)
        except OSError:
            return False
        self.said += text.decode(errors="replace")
        return bool(text)


@pytest.mark.parametrize("end", ["Ctrl-C", pytest.param("closed", marks=pytest.mark.long)])
def test_it_writes_a_checkpoint_and_tells_how_to_go_on(end, tmp_path):
    recipe = write_recipe(tmp_path, train={"steps": 100_000, "evaluations": 1}, checkpoint={"every": None})
    folder = RunFolder(tmp_path / "run")
    terminal = Terminal(sys.executable, "-m", "hpc_oialr", "train", str(recipe), "--out", str(folder.path))
    while not (folder.metrics.exists() and folder.metrics.read_bytes().count(b"\n") > 2):
        assert terminal.read(), terminal.said
    if end == "Ctrl-C":
        os.write(terminal.master, b"\x03")
        while terminal.read():
            pass
        assert "a checkpoint is written after this step; Ctrl-C again: end at once" in terminal.said
        assert f"resume with: oialr resume {folder.path}" in terminal.said
    os.close(terminal.master)
    assert terminal.process.wait(timeout=120) == 75
    assert len(list(folder.checkpoints.glob("step_*"))) == 1
    assert not folder.owner.exists()
    assert not folder.finished
