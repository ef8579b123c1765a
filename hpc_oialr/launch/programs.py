"""Slurm's programs: run one, and take what it says or the reason why it says nothing."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

_TIMEOUT_S = 60


class NoAnswerError(Exception):
    """A program is missing, failed or hangs; the text is the reason in one line."""


def ask(command: Sequence[str], *, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program, without a shell, to its end.

    Parameters
    ----------
    text
        Standard input.

    Raises
    ------
    NoAnswerError
        If it is missing, fails, or takes longer than a minute.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, input=text, timeout=_TIMEOUT_S)
    except FileNotFoundError:
        raise NoAnswerError(f"there is no {command[0]} here") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoAnswerError(str(error)) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise NoAnswerError(" ".join(" ".join(lines).split()))
    return done
