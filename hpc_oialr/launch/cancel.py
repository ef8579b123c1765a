"""Ending submitted jobs."""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path

from hpc_oialr.errors import OIALRError
from hpc_oialr.launch.job_file import JobFile, read_job
from hpc_oialr.launch.jobs import find_runs
from hpc_oialr.launch.programs import ORDER_S, NoAnswerError, ask
from hpc_oialr.launch.states import is_controller

_JOB_ID = re.compile(r"\d+(_\d+)?")


def cancel(target: str) -> list[str]:
    """End the job of a run's folder, all of an array's, or the one that Slurm knows by its number.

    Returns
    -------
    list of str
        Ids of the jobs that were told to end.

    Raises
    ------
    OIALRError
        If there is no such job.
    """
    if not Path(target).exists() and _JOB_ID.fullmatch(target):
        _scancel(target)
        return [target]
    jobs = [read_job(folder) for folder in find_runs([Path(target)])]
    for job in jobs:
        _cancel(job)
    return [job.job_id for job in jobs]


def _cancel(job: JobFile) -> None:
    if job.elsewhere:
        raise OIALRError(f"job {job.job_id} is another cluster's. First: {job.elsewhere}")
    if job.executor == "slurm":
        _scancel(job.job_id)
        return
    if job.host != socket.gethostname():
        raise OIALRError(
            f"job {job.job_id} runs on {job.host}, and this is {socket.gethostname()}. End it there."
        )
    if not is_controller(job):
        raise OIALRError(f"job {job.job_id} is not running on this machine any more.")
    # It hands the signal on to the processes, which write a checkpoint and stop.
    os.kill(int(job.job_id), signal.SIGTERM)


def _scancel(job_id: str) -> None:
    try:
        ask(["scancel", job_id], timeout_s=ORDER_S)
    except NoAnswerError as error:
        raise OIALRError(f"job {job_id} was not cancelled: {error}.") from None
