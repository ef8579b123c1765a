"""The Slurm job around this process, read from its variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from hpc_oialr.errors import ConfigError


@dataclass(frozen=True)
class SlurmJob:
    """A job.

    Attributes
    ----------
    id
        Its number; ``ARRAY_TASK`` for a task of an array, whose last one bears the whole array's number.
    restarts
        How often it was requeued so far.
    end
        Unix time of its end (s), where Slurm tells it.
    """

    id: str
    restarts: int = 0
    end: float | None = None


def slurm_job(environ: Mapping[str, str] | None = None) -> SlurmJob | None:
    """The job this process runs in, if there is one."""
    env = os.environ if environ is None else environ
    number = env.get("SLURM_JOB_ID", "")
    if not number:
        return None
    array, task = env.get("SLURM_ARRAY_JOB_ID", ""), env.get("SLURM_ARRAY_TASK_ID", "")
    number = f"{array}_{task}" if array and task else number
    end = _digits(env.get("SLURM_JOB_END_TIME", ""))
    return SlurmJob(
        number, _digits(env.get("SLURM_RESTART_COUNT", "")) or 0, None if end is None else float(end)
    )


def max_requeues(environ: Mapping[str, str] | None = None) -> int:
    """``OIALR_MAX_REQUEUES``: how often a job may be requeued; default 20.

    Raises
    ------
    ConfigError
        If it is no whole number.
    """
    env = os.environ if environ is None else environ
    text = env.get("OIALR_MAX_REQUEUES", "20")
    number = _digits(text)
    if number is None:
        raise ConfigError("OIALR_MAX_REQUEUES", text, "must be a whole number", origin="the environment")
    return number


def _digits(text: str) -> int | None:
    return int(text) if text.strip().isdigit() else None
