"""Run another program with a timeout: it may be missing, fail or hang."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Answer:
    """Output of a program."""

    stdout: str = ""
    stderr: str = ""
    code: int | None = None  # None if it did not exit by itself
    trouble: Literal["", "missing", "refused", "hung"] = ""  # refused: it cannot be started

    @property
    def reason(self) -> str:
        """Why it failed: its last line of output."""
        if self.trouble == "hung":
            return "no answer in time"
        lines = (self.stderr.strip() or self.stdout.strip()).splitlines()
        return lines[-1].strip()[:200] if lines else f"exit code {self.code}"


def run_command(
    command: Sequence[str],
    *,
    timeout_s: float,
    environ: Mapping[str, str] | None = None,
    text: str | None = None,
    pass_fds: Sequence[int] = (),
    cwd: Path | None = None,
) -> Answer:
    """Run a program without a shell; after ``timeout_s`` it is killed with its children.

    ``environ``: its variables, by default this process's; ``text``: standard input; ``pass_fds``: files that stay open.
    """
    try:
        process = subprocess.Popen(
            command,
            env=None if environ is None else dict(environ),
            stdin=subprocess.DEVNULL if text is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            pass_fds=pass_fds,
            cwd=cwd,
        )
    except FileNotFoundError as error:
        return Answer(stderr=str(error), trouble="missing")
    except OSError as error:
        return Answer(stderr=str(error), trouble="refused")
    try:
        stdout, stderr = process.communicate(text, timeout=timeout_s)
    except BaseException as error:
        # Children too, and on Ctrl-C as well, which does not reach another session.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        try:
            return Answer(*process.communicate(timeout=1.0), trouble="hung")
        except subprocess.TimeoutExpired:
            # It waits inside the kernel, e.g. for a file server, and dies when that answers.
            return Answer(trouble="hung")
    return Answer(stdout, stderr, process.returncode)
