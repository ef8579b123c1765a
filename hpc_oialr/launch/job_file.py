"""``job.json``: which job works in a run folder; without the run's settings, which may hold secrets. Log files."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hpc_oialr.distributed.environment import all_variables, launch_info
from hpc_oialr.distributed.slurm import max_requeues, slurm_job
from hpc_oialr.errors import ConfigError, DataError
from hpc_oialr.launch.slurm import show_job
from hpc_oialr.record.files import to_json, write_atomically
from hpc_oialr.record.run_folder import RunFolder

_TAIL = 8_192
_POLL_S = 0.5
# Best first: our own message, the last line of an exception, any line of neither a launcher nor a traceback, any line.
_TELLING = (
    re.compile(r"oialr: error: "),
    re.compile(r"(\w+\.)*\w*(Error|Exception|Interrupt)\b"),
    re.compile(r"(?!srun: |slurmstepd: |submitit |\s).+"),
    re.compile(r".*\S"),
)


@dataclass(frozen=True, kw_only=True)
class JobFile:
    """A submitted job."""

    # Slurm's, e.g. "12" or "12_0"; with the executor "local" the process id of submitit's controller.
    job_id: str
    executor: str
    recipe: str
    processes: int
    max_requeues: int
    output: Path  # log files: %t stands for the process, %s for "out" or "err"
    # SLURM_CLUSTERS at submission: on another cluster the same number is another job.
    clusters: str = field(default_factory=lambda: all_variables().get("SLURM_CLUSTERS", ""))
    host: str = field(default_factory=socket.gethostname)
    submitted: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def elsewhere(self) -> str:
        """What to set before Slurm is asked about the job; "" if nothing."""
        here = all_variables().get("SLURM_CLUSTERS", "")
        if self.executor != "slurm" or here == self.clusters:
            return ""
        return f"export SLURM_CLUSTERS={self.clusters}" if self.clusters else "unset SLURM_CLUSTERS"

    def write(self, folder: RunFolder) -> None:
        """Write it into a run folder; paths are relative to it, so that it can be moved."""
        fields = {"version": 1, **asdict(self), "output": os.path.relpath(self.output, folder.path)}
        write_atomically(folder.job, to_json(fields, indent=2) + "\n")

    def log(self, process: int, stream: str) -> Path:
        """Log file of a process; ``stream`` is "out" or "err"."""
        return Path(str(self.output).replace("%t", str(process)).replace("%s", stream))


def read_job(folder: RunFolder) -> JobFile:
    """Read ``job.json``; raises :class:`DataError` if there is none or it is damaged."""
    try:
        fields: dict[str, Any] = json.loads(folder.job.read_text(encoding="utf-8"))
        fields.pop("version")
        return JobFile(**{**fields, "output": folder.path / fields["output"]})
    except FileNotFoundError:
        raise DataError(f"{folder.path} holds no submitted run: there is no {folder.job}.") from None
    except OSError as error:
        raise DataError(f"{folder.job} cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{folder.job} is damaged ({error}). Remove it; the run itself is not touched.") from None


def note_job(folder: Path, recipe: str, environ: Mapping[str, str] | None = None) -> None:
    """Write ``job.json`` for the run of a batch script, on rank 0, so that ``oialr jobs`` shows it too."""
    job, info = slurm_job(environ), launch_info(environ)
    if job is None or info.rank != 0:
        return
    run_folder = RunFolder(folder)
    try:
        if read_job(run_folder).job_id == job.id:
            return
    except DataError:
        pass  # none yet, or damaged
    # Unknown inside a container, which has no scontrol.
    output = Path(show_job(job.id).get("StdOut") or "unknown")
    run_folder.create()
    JobFile(
        job_id=job.id,
        executor="slurm",
        recipe=recipe,
        processes=info.size,
        max_requeues=max_requeues(environ),
        output=output.absolute(),
    ).write(run_folder)


def last_error(job: JobFile) -> str:
    """The line that best says why a job failed; "" if its processes printed nothing."""
    lines = []
    for path in dict.fromkeys(job.log(process, "err") for process in range(job.processes)):
        if path.exists():
            with path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
                lines += file.read().decode(errors="replace").splitlines()
    for pattern in _TELLING:
        found = [line.strip() for line in lines if pattern.match(line)]
        if found:
            return found[-1]
    return ""


def log_files(folder: RunFolder, process: int) -> list[Path]:
    """Files with what a process printed; its log in the run folder for a run that was not submitted.

    Raises :class:`ConfigError` if the run has no such process, :class:`DataError` if the folder holds no run.
    """
    if folder.job.exists():
        job = read_job(folder)
        if not 0 <= process < job.processes:
            raise ConfigError("process", process, f"must lie in [0, {job.processes})")
        return list(dict.fromkeys(job.log(process, stream) for stream in ("out", "err")))
    path = folder.logs / f"process_{process}.log"
    if not path.exists():
        raise DataError(f"{folder.path} has no log of process {process}: there is no {path}.")
    return [path]


def follow(
    files: Sequence[Path], over: Callable[[], bool], *, sleep: Callable[[float], None] = time.sleep
) -> Iterator[str]:
    """Content of files, which may appear later, and whole lines added to them until ``over()``; then the rest."""
    positions = dict.fromkeys(files, 0)
    while True:
        last = over()
        for path in files:
            if not path.exists():
                continue
            with path.open("rb") as file:
                file.seek(positions[path])
                content = file.read()
            if not last:
                content = content[: content.rfind(b"\n") + 1]
            positions[path] += len(content)
            if content:
                yield content.decode(errors="replace")
        if last:
            return
        sleep(_POLL_S)
