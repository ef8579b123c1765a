"""``job.json``: which job does the run in a folder; without the run's settings, which may hold secrets."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hpc_oialr.distributed.environment import all_variables
from hpc_oialr.errors import DataError
from hpc_oialr.record.files import to_json, write_atomically
from hpc_oialr.record.run_folder import RunFolder


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class JobFile:
    """A submitted job.

    Attributes
    ----------
    job_id
        Of Slurm, e.g. "12" or "12_0"; of the local executor the process id of its parent process.
    executor
        "slurm", "local" or "debug".
    recipe
        Name or path of the recipe.
    processes
        How many.
    max_requeues
        After so many requeues it stays stopped.
    output
        Where processes print: ``%t`` stands for the process, ``%s`` for "out" or "err".
    clusters
        ``SLURM_CLUSTERS`` when it was submitted: elsewhere its number is another job's.
    host
        Where it was submitted.
    submitted
        When, ISO 8601.
    """

    job_id: str
    executor: str
    recipe: str
    processes: int
    max_requeues: int
    output: Path
    clusters: str = field(default_factory=lambda: all_variables().get("SLURM_CLUSTERS", ""))
    host: str = field(default_factory=socket.gethostname)
    submitted: str = field(default_factory=_now)

    @property
    def elsewhere(self) -> str:
        """What to set before Slurm is asked about the job; "" if nothing."""
        here = all_variables().get("SLURM_CLUSTERS", "")
        if self.executor != "slurm" or here == self.clusters:
            return ""
        return f"export SLURM_CLUSTERS={self.clusters}" if self.clusters else "unset SLURM_CLUSTERS"

    def write(self, folder: RunFolder) -> None:
        """Write it into a run's folder; paths relative to it, so that it may be moved."""
        fields = {"version": 1, **asdict(self), "output": os.path.relpath(self.output, folder.path)}
        write_atomically(folder.job, to_json(fields, indent=2) + "\n")

    def log(self, process: int, stream: str) -> Path:
        """What a process printed; ``stream`` is "out" or "err"."""
        return Path(str(self.output).replace("%t", str(process)).replace("%s", stream))


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
        return JobFile(**{**fields, "output": folder.path / fields["output"]})
    except FileNotFoundError:
        raise DataError(f"{folder.path} holds no submitted run: there is no {folder.job}.") from None
    except OSError as error:
        raise DataError(f"{folder.job} cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{folder.job} is damaged ({error}). Remove it; the run itself is not touched."
        ) from None
