"""Commands of checks: each runs with a timeout."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from hpc_oialr import commands
from hpc_oialr.commands import Answer
from hpc_oialr.doctor.context import CheckContext

_PROBES = Path(__file__).with_name("probes")
_SLOW = 3


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
    timeout_s = context.timeout_s * (_SLOW if slow else 1)
    return commands.run_command(words, timeout_s=timeout_s, environ=context.environ, pass_fds=_pmi(context))


def probe(context: CheckContext, name: str, *words: str, slow: bool = False) -> tuple[dict[str, Any], Answer]:
    """Run one of the scripts beside this file in a fresh interpreter.

    Returns
    -------
    tuple
        What it has found out, as far as it came, and how it ended.
    """
    answer = run_command(context, sys.executable, str(_PROBES / f"{name}.py"), *words, slow=slow)
    report: dict[str, Any] = {}
    for line in answer.stdout.splitlines():
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
