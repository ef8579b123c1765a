"""Programs that a check asks: each command runs with a timeout; it may be missing, fail, or hang."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpc_oialr.doctor.context import CheckContext

_PROBES = Path(__file__).with_name("probes")
_SLOW = 3
_REAPING_S = 1.0
_LONGEST = 200


@dataclass(frozen=True)
class Answer:
    """What a program said.

    Attributes
    ----------
    out, err
        Its standard output and error, as far as it came.
    code
        Its exit code; None if it did not come to its end.
    trouble
        "missing", "hung" or "".
    """

    out: str = ""
    err: str = ""
    code: int | None = None
    trouble: Literal["", "missing", "hung"] = ""

    @property
    def reason(self) -> str:
        """Why it failed, in one line: the last that it said."""
        if self.trouble == "hung":
            return "no answer in time"
        lines = (self.err.strip() or self.out.strip()).splitlines()
        return lines[-1].strip()[:_LONGEST] if lines else f"exit code {self.code}"


def find(context: CheckContext, name: str) -> str | None:
    """Path of a program, if there is one."""
    return shutil.which(name, path=context.environ.get("PATH", os.defpath))


def run_command(context: CheckContext, *words: str, slow: bool = False) -> Answer:
    """Run a program with the context's variables, without a shell; it is ended, with its children, if it hangs.

    Parameters
    ----------
    slow
        Allow three times ``context.timeout_s``.
    """
    try:
        process = subprocess.Popen(
            words,
            env=dict(context.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            pass_fds=_pmi(context),
        )
    except OSError as error:
        return Answer(err=str(error), trouble="missing")
    try:
        out, err = process.communicate(timeout=context.timeout_s * (_SLOW if slow else 1))
    except subprocess.TimeoutExpired:
        return Answer(*_end(process), trouble="hung")
    return Answer(out, err, process.returncode)


def probe(context: CheckContext, name: str, *words: str, slow: bool = False) -> tuple[dict[str, Any], Answer]:
    """Run one of the scripts beside this file in a fresh interpreter.

    Returns
    -------
    tuple
        What it has found out, as far as it came, and how it ended.
    """
    answer = run_command(context, sys.executable, str(_PROBES / f"{name}.py"), *words, slow=slow)
    report: dict[str, Any] = {}
    for line in answer.out.splitlines():
        # Libraries write on standard output, too.
        with contextlib.suppress(ValueError):
            found = json.loads(line) if line.startswith("{") else {}
            report.update(found)
    return report, answer


def _pmi(context: CheckContext) -> tuple[int, ...]:
    """PMI2 gives a process a connection to the launcher, not an address."""
    number = context.environ.get("PMI_FD", "")
    if not number.isdigit():
        return ()
    try:
        os.fstat(int(number))
    except OSError:
        return ()
    return (int(number),)


def _end(process: subprocess.Popen[str]) -> tuple[str, str]:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        return process.communicate(timeout=_REAPING_S)
    except subprocess.TimeoutExpired:
        # It waits inside the kernel, for a file server say, and dies when that answers.
        return "", ""
