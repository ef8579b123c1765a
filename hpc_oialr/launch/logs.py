"""What a run's processes printed: read, followed, and searched for the line that says why it failed."""

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
# Best first: our own message, an exception's last line, anything that is no launcher's or a traceback's.
_TELLING = (
    re.compile(r"oialr: error: "),
    re.compile(r"(\w+\.)*\w*(Error|Exception|Interrupt)\b"),
    re.compile(r"(?!srun: |slurmstepd: |submitit |\s).+"),
    re.compile(r".*\S"),
)


def last_error(job: JobFile) -> str:
    """The line of a failed job's processes that best says why; empty if they said nothing."""
    files = dict.fromkeys(job.log(process, "err") for process in range(job.processes))
    lines = [line for path in files for line in _last_lines(path)]
    for pattern in _TELLING:
        found = [line.strip() for line in lines if pattern.match(line)]
        if found:
            return found[-1]
    return ""


def _last_lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            return file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []


def log_files(folder: RunFolder, process: int) -> list[Path]:
    """Files with what a process printed; its log in the run's folder for a run that was not submitted.

    Raises
    ------
    ConfigError
        If the run has no such process.
    DataError
        If the folder holds no run.
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
    """What files hold, and what is added to them until ``over()``; files may appear later.

    Parameters
    ----------
    over
        Whether nothing more will come; what came before that is still read.
    """
    positions = dict.fromkeys(files, 0)
    while True:
        last = over()
        for path in files:
            text, positions[path] = _read_from(path, positions[path], whole_lines=not last)
            if text:
                yield text
        if last:
            return
        sleep(_POLL_S)


def _read_from(path: Path, position: int, *, whole_lines: bool) -> tuple[str, int]:
    """Text after a position, and where it ends."""
    try:
        with path.open("rb") as file:
            file.seek(position)
            content = file.read()
    except FileNotFoundError:
        return "", position
    if whole_lines:
        content = content[: content.rfind(b"\n") + 1]
    return content.decode(errors="replace"), position + len(content)
