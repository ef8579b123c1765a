"""What the processes of a run printed: read, follow, find the line that says why it failed."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hpc_oialr.errors import ConfigError, DataError
from hpc_oialr.launch.job_file import JobFile, read_job
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
