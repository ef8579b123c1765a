"""Submitted runs as rows: what Slurm says of the job, and what the run's folder says of the run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from hpc_oialr.errors import DataError
from hpc_oialr.launch.job_file import JobFile, read_job
from hpc_oialr.launch.logs import last_error
from hpc_oialr.launch.run_progress import RunProgress, read_progress
from hpc_oialr.launch.slurm_state import ENDED, FORGOTTEN, JobState, Slurm
from hpc_oialr.launch.states import states_of
from hpc_oialr.record.run_folder import RunFolder

log = logging.getLogger(__name__)

ROOT = Path("runs")


@dataclass(frozen=True, kw_only=True)
class JobRow:
    """One submitted run.

    Attributes
    ----------
    folder
        The run's.
    job
        What was submitted.
    state
        Of the job; COMPLETED or ENDED where nobody but the folder knows.
    progress
        Of the run.
    error
        Last line of what the job said when it failed; empty if it did not.
    """

    folder: RunFolder
    job: JobFile
    state: JobState
    progress: RunProgress
    error: str = ""

    @property
    def left_s(self) -> float | None:
        """Time until the job must end, while it runs (s)."""
        if self.state.state != "RUNNING" or self.state.end is None:
            return None
        return (self.state.end - datetime.now()).total_seconds()

    @property
    def eta_s(self) -> float | None:
        """Time to the run's end, while it runs (s)."""
        return self.progress.eta_s if self.state.state == "RUNNING" else None


def find_runs(given: Sequence[Path] = (), root: Path = ROOT) -> list[RunFolder]:
    """Folders of submitted runs.

    Parameters
    ----------
    given
        Folders of runs, or of arrays of runs; none: all under ``root``.

    Raises
    ------
    DataError
        If a given one holds no submitted run.
    """
    if not given:
        return [*_inside(root), *(run for folder in sorted(root.glob("*/")) for run in _inside(folder))]
    found: list[RunFolder] = []
    for path in given:
        runs = [RunFolder(path)] if RunFolder(path).job.exists() else _inside(path)
        if not runs:
            raise DataError(
                f"{path} holds no submitted run: there is no {RunFolder(path).job}. oialr jobs --all lists those "
                f"under {root}."
            )
        found.extend(runs)
    return found


def _inside(folder: Path) -> list[RunFolder]:
    return [RunFolder(path.parent) for path in sorted(folder.glob("*/job.json"))]


def rows_of(folders: Iterable[RunFolder], slurm: Slurm) -> list[JobRow]:
    """One row a run, in the order of submission; Slurm is asked once for all.

    A run whose files are damaged is left out, and named in a warning.
    """
    read = []
    for folder in folders:
        try:
            read.append((folder, read_job(folder)))
        except DataError as error:
            log.warning("%s", error)
    read.sort(key=lambda pair: pair[1].submitted)
    states = states_of([job for _, job in read], slurm)
    return [_row(folder, job, state) for (folder, job), state in zip(read, states, strict=True)]


def _row(folder: RunFolder, job: JobFile, state: JobState) -> JobRow:
    if state.state == FORGOTTEN:
        state = replace(state, state="COMPLETED" if folder.finished else ENDED)
    failed = state.over and not folder.finished
    error = last_error(job) if failed else ""
    return JobRow(folder=folder, job=job, state=state, progress=read_progress(folder), error=error)
