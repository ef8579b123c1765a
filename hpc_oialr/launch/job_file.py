"""``job.json``: which job does the run in a folder; written at submission, without the run's settings."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpc_oialr.errors import DataError
from hpc_oialr.record.files import to_json, write_atomically
from hpc_oialr.record.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class JobFile:
    """A submitted job.

    Attributes
    ----------
    job_id
        Of Slurm, e.g. "12" or "12_0"; of the local executor the process id of its parent process.
    executor
        "slurm", "local" or "debug".
    host
        Where it was submitted.
    recipe
        Name or path of the recipe.
    nodes, processes
        Its width.
    time_s
        Its time limit (s).
    max_requeues
        After so many requeues it stays stopped.
    submission
        Folder of its log files.
    submitted
        When, ISO 8601.
    """

    job_id: str
    executor: str
    host: str
    recipe: str
    nodes: int
    processes: int
    time_s: int
    max_requeues: int
    submission: Path
    submitted: str

    def write(self, folder: RunFolder) -> None:
        """Write it into a run's folder; paths relative to it, so that it may be moved."""
        fields = {"version": 1, **asdict(self), "submission": os.path.relpath(self.submission, folder.path)}
        write_atomically(folder.job, to_json(fields, indent=2) + "\n")

    def log(self, process: int, stream: str) -> Path:
        """What a process printed; ``stream`` is "out" or "err"."""
        return self.submission / f"{self.job_id}_{process}_log.{stream}"


def read_job(folder: RunFolder) -> JobFile:
    """The job that does the run in a folder.

    Raises
    ------
    DataError
        If there is none, or the file is damaged.
    """
    try:
        fields: dict[str, Any] = json.loads(folder.job.read_text(encoding="utf-8"))
        fields.pop("version")
        return JobFile(**{**fields, "submission": folder.path / fields["submission"]})
    except FileNotFoundError:
        raise DataError(f"{folder.path} holds no submitted run: there is no {folder.job}.") from None
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{folder.job} is damaged ({error}). Remove it; the run itself is not touched."
        ) from None
