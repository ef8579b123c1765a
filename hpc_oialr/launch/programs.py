"""Slurm's programs: run one, and take what it says or the reason why it says nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hpc_oialr.commands import Answer, run_command
from hpc_oialr.distributed.environment import all_variables

# An answer comes within a second; a controller that hangs must not hold the user up.
QUESTION_S = 10.0
# What is to be done should be done, though the controller be busy.
ORDER_S = 60.0
# Defaults that a user or site has set for programs whose output is read here: other columns, other jobs, other times.
_CHANGE_OUTPUT = (
    "SQUEUE_",
    "SACCT_",
    "SINFO_",
    "SCONTROL_",
    "SCANCEL_",
    "SLURM_TIME_FORMAT",
    "SLURM_BITSTR_LEN",
    "SLURM_JSON",
    "SLURM_YAML",
)


class NoAnswerError(Exception):
    """A program is missing, failed or hangs; the text is the reason in one line."""


def ask(command: Sequence[str], *, text: str | None = None, timeout_s: float = QUESTION_S) -> Answer:
    """Run a program, without a shell, to its end.

    Parameters
    ----------
    text
        Standard input.
    timeout_s
        Longest wait (s).

    Raises
    ------
    NoAnswerError
        If it is missing, fails, or does not answer in time.
    """
    answer = run_command(command, timeout_s=timeout_s, environ=plain_variables(), text=text)
    if answer.trouble == "hung":
        raise NoAnswerError(f"{command[0]} does not answer within {timeout_s:g} s")
    if answer.trouble == "missing":
        raise NoAnswerError(f"there is no {command[0]} here")
    if answer.code != 0:
        raise NoAnswerError(" ".join(answer.stderr.split()) or f"exit code {answer.code}")
    return answer


def plain_variables(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment without what changes the output of Slurm's programs.

    Examples
    --------
    >>> plain_variables({"SQUEUE_PARTITION": "gpu", "SLURM_TIME_FORMAT": "relative", "SLURM_CONF": "/etc/slurm.conf"})
    {'SLURM_CONF': '/etc/slurm.conf'}
    """
    return {
        name: value for name, value in all_variables(environ).items() if not name.startswith(_CHANGE_OUTPUT)
    }
