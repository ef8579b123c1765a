"""Submitted runs: find them, ask for their states and progress, cancel their jobs."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from hpc_oialr.errors import DataError, OIALRError
from hpc_oialr.launch.job_file import JobFile, last_error, read_job
from hpc_oialr.launch.slurm import ENDED, FORGOTTEN, ORDER_S, UNKNOWN, JobState, NoAnswerError, Slurm, ask
from hpc_oialr.record.metrics import read_last_metrics
from hpc_oialr.record.run_folder import RunFolder

log = logging.getLogger(__name__)

ROOT = Path("runs")
_JOB_ID = re.compile(r"\d+(_\d+)?")


@dataclass(frozen=True, kw_only=True)
class JobRow:
    """One submitted run: its job, the job's state, and the run's last figures, None for those that are not there yet."""

    folder: RunFolder
    job: JobFile
    state: JobState  # COMPLETED or ENDED where only the run folder tells
    error: str  # last telling line of the log, if the job failed
    step: int | None = None
    total_steps: int | None = None
    step_s: float | None = None  # time per step over the last rows
    age_s: float = 0.0  # since the last row was written
    loss: float | None = None
    metric: float | None = None
    metric_name: str = ""
    trained_share: float | None = None  # trained parameters, of the dense model's, in [0, 1]
    r_mean: float | None = None  # over layers, at the last update

    @property
    def left_s(self) -> float | None:
        """Time until the job must end, while it runs (s)."""
        if self.state.state != "RUNNING" or self.state.end is None:
            return None
        return (self.state.end - datetime.now()).total_seconds()

    @property
    def eta_s(self) -> float | None:
        """Time to the run's end, while it runs (s)."""
        if self.state.state != "RUNNING" or self.step is None or not self.total_steps or self.step_s is None:
            return None
        return max(0.0, (self.total_steps - self.step) * self.step_s - self.age_s)


def find_runs(given: Sequence[Path] = ()) -> list[RunFolder]:
    """Folders of submitted runs: in the given folders of runs or arrays, or all under ``runs``.

    Raises :class:`DataError` if a given folder holds no submitted run.
    """
    if not given:
        return [*_inside(ROOT), *(run for folder in sorted(ROOT.glob("*/")) for run in _inside(folder))]
    found: list[RunFolder] = []
    for path in given:
        runs = [RunFolder(path)] if RunFolder(path).job.exists() else _inside(path)
        if not runs:
            raise DataError(
                f"{path} holds no submitted run: there is no {RunFolder(path).job}. "
                f"oialr jobs --all lists those under {ROOT}."
            )
        found.extend(runs)
    return found


def _inside(folder: Path) -> list[RunFolder]:
    return [RunFolder(path.parent) for path in sorted(folder.glob("*/job.json"))]


def rows_of(folders: Iterable[RunFolder], slurm: Slurm) -> list[JobRow]:
    """One row a run, in the order of submission; Slurm is asked once. Runs with damaged files: a warning, no row."""
    read = []
    for folder in folders:
        try:
            read.append((folder, read_job(folder)))
        except DataError as error:
            log.warning("%s", error)
    read.sort(key=lambda pair: pair[1].submitted)
    rows = []
    for (folder, job), state in zip(read, states_of([job for _, job in read], slurm), strict=True):
        if state.state == FORGOTTEN:
            state = replace(state, state="COMPLETED" if folder.finished else ENDED)
        reason = last_error(job) if state.over and not folder.finished else ""
        rows.append(JobRow(folder=folder, job=job, state=state, error=reason, **read_progress(folder)))
    return rows


def read_progress(folder: RunFolder) -> dict[str, Any]:
    """Figures of :class:`JobRow` from a run folder; raises :class:`DataError` if its metrics are damaged."""
    rows = read_last_metrics(folder.metrics)
    steps = [row for row in rows if "loss" in row and "split" not in row]
    evaluations = [row for row in rows if "split" in row]
    updates = [row for row in read_last_metrics(folder.updates) if row.get("r_mean") is not None]
    figures: dict[str, Any] = {}
    if steps:
        first, last = steps[0], steps[-1]
        figures = {name: last.get(name) for name in ("step", "total_steps", "loss", "trained_share")}
        figures["age_s"] = max(0.0, time.time() - folder.metrics.stat().st_mtime)
        if (done := last["step"] - first["step"]) > 0:
            figures["step_s"] = (last["wall_s"] - first["wall_s"]) / done
    if evaluations:
        figures |= {name: evaluations[-1].get(name) for name in ("metric", "metric_name")}
    if updates:
        figures["r_mean"] = updates[-1]["r_mean"]
    return figures


def states_of(jobs: Sequence[JobFile], slurm: Slurm) -> list[JobState]:
    """One state for each job, of any executor.

    UNKNOWN where nobody can be asked; FORGOTTEN where the job is over and how it ended is not known.
    """
    known = slurm.states(job.job_id for job in jobs if job.executor == "slurm" and not job.elsewhere)

    def state(job: JobFile) -> JobState:
        if job.elsewhere:
            slurm.warn_once("clusters", f"job {job.job_id} is another cluster's; to see it: {job.elsewhere}")
            return JobState(state=UNKNOWN)
        if job.executor == "slurm":
            return known.get(job.job_id, JobState(state=FORGOTTEN if slurm.reached else UNKNOWN))
        if job.executor == "local" and job.host != socket.gethostname():
            return JobState(state=UNKNOWN)
        return JobState(state="RUNNING" if job.executor == "local" and is_controller(job) else FORGOTTEN)

    return [state(job) for job in jobs]


def is_controller(job: JobFile) -> bool:
    """Whether a local job's controller is alive; another process may have its number by now."""
    path = Path("/proc", job.job_id, "cmdline")
    try:
        if path.parents[1].exists():
            words = path.read_text(errors="replace")
        else:
            # Systems without /proc have ps, and containers without ps have /proc.
            words = ask(["ps", "-ww", "-o", "args=", "-p", job.job_id]).stdout
    except (OSError, NoAnswerError):
        return False
    return "submitit.local._local" in words and str(job.output.parent.resolve()) in words


def watch_job(
    job: JobFile, *, every_s: float = 10.0, clock: Callable[[], float] = time.monotonic
) -> Callable[[], bool]:
    """A function that tells whether a job is over; it asks Slurm at most every ``every_s`` seconds."""
    slurm, over, due_s = Slurm(), False, clock()

    def is_over() -> bool:
        nonlocal over, due_s
        if not over and clock() >= due_s:
            due_s = clock() + every_s
            over = states_of([job], slurm)[0].over
        return over

    return is_over


def cancel(target: str) -> list[str]:
    """Cancel the job of a run folder, all jobs of an array's or a search's that are not over, or a Slurm job; their ids.

    Raises :class:`OIALRError` if there is no such job.
    """
    if not Path(target).exists() and _JOB_ID.fullmatch(target):
        _scancel(target)
        return [target]
    jobs = [read_job(folder) for folder in find_runs([Path(target)])]
    if len(jobs) > 1:
        jobs = [job for job, state in zip(jobs, states_of(jobs, Slurm()), strict=True) if not state.over] or jobs
    for job in jobs:
        if job.elsewhere:
            raise OIALRError(f"job {job.job_id} is another cluster's. First: {job.elsewhere}")
        if job.executor == "slurm":
            _scancel(job.job_id)
        elif job.host != socket.gethostname():
            raise OIALRError(f"job {job.job_id} runs on {job.host}, and this is {socket.gethostname()}. End it there.")
        elif not is_controller(job):
            raise OIALRError(f"job {job.job_id} is not running on this machine any more.")
        else:
            # The controller forwards the signal to the processes, which write a checkpoint and stop.
            os.kill(int(job.job_id), signal.SIGTERM)
    return [job.job_id for job in jobs]


def _scancel(job_id: str) -> None:
    try:
        ask(["scancel", job_id], timeout_s=ORDER_S)
    except NoAnswerError as error:
        raise OIALRError(f"job {job_id} was not cancelled: {error}.") from None
