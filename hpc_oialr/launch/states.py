"""States of submitted jobs, whatever runs them."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hpc_oialr.launch.job_file import JobFile
from hpc_oialr.launch.programs import NoAnswerError, ask
from hpc_oialr.launch.slurm_state import FORGOTTEN, UNKNOWN, JobState, Slurm


def states_of(jobs: Sequence[JobFile], slurm: Slurm) -> list[JobState]:
    """One state for each job.

    UNKNOWN where nobody can be asked; FORGOTTEN where the job is over and nobody knows how it ended.
    """
    known = slurm.states(job.job_id for job in jobs if job.executor == "slurm" and not job.elsewhere)
    unknown = JobState(state=FORGOTTEN if slurm.reached else UNKNOWN)

    def state(job: JobFile) -> JobState:
        if job.elsewhere:
            slurm.say("clusters", f"job {job.job_id} is another cluster's; to see it: {job.elsewhere}")
            return JobState(state=UNKNOWN)
        return known.get(job.job_id, unknown) if job.executor == "slurm" else _here(job)

    return [state(job) for job in jobs]


def _here(job: JobFile) -> JobState:
    """A job of the local executor, whose id is that of a process of its host; or of the debug executor."""
    if job.executor == "local" and job.host != socket.gethostname():
        return JobState(state=UNKNOWN)
    return JobState(state="RUNNING" if job.executor == "local" and is_controller(job) else FORGOTTEN)


def is_controller(job: JobFile) -> bool:
    """Whether the local job's parent process is there; another process may have its number by now."""
    words = _command_line(job.job_id)
    return "submitit.local._local" in words and str(job.output.parent.resolve()) in words


def _command_line(process_id: str) -> str:
    """How a process was started; empty if there is none."""
    path = Path("/proc", process_id, "cmdline")
    try:
        # Not everybody has /proc, and not everybody has ps.
        return path.read_text(errors="replace") if path.parents[1].exists() else _by_ps(process_id)
    except OSError:
        return ""


def _by_ps(process_id: str) -> str:
    try:
        return ask(["ps", "-ww", "-o", "args=", "-p", process_id]).stdout
    except NoAnswerError:
        return ""


def job_over(job: str) -> bool | None:
    """Whether a Slurm job will not run again; None if Slurm cannot be asked."""
    # Asked again and again while somebody waits for a folder: what is not known shows in what is returned.
    slurm = Slurm(level=logging.INFO)
    found = slurm.states([job]).get(job)
    if found is not None:
        return found.over
    return True if slurm.reached else None


class Over:
    """Whether a job is over; asks for its state now and then only, however often it is called."""

    def __init__(
        self, job: JobFile, *, every_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._job, self._slurm = job, Slurm()
        self._every_s, self._clock, self._next = every_s, clock, clock()
        self._over = False

    def __call__(self) -> bool:
        """True once the job is over."""
        if not self._over and self._clock() >= self._next:
            self._next = self._clock() + self._every_s
            self._over = states_of([self._job], self._slurm)[0].over
        return self._over
