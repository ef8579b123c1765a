"""One run inside one job: started or resumed, stopped early by signals or before the job's end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_oialr.distributed.environment import launch_info
from hpc_oialr.distributed.signals import NAMES, catch_signals
from hpc_oialr.distributed.slurm import max_requeues, slurm_job
from hpc_oialr.errors import ProcessLostError
from hpc_oialr.exit_codes import FINISHED, PROCESS_LOST, STOPPED
from hpc_oialr.launch.slurm import end_of, job_over
from hpc_oialr.record.run_folder import RunFolder
from hpc_oialr.redaction import one_line

if TYPE_CHECKING:
    from hpc_oialr.train.load_config import LoadedConfig
    from hpc_oialr.train.timing import StopRequest


@dataclass(frozen=True)
class RecipeRun:
    """The call that submitit carries to the job, the same after every requeue: start or resume a run."""

    recipe: str
    folder: Path
    settings: tuple[str, ...]

    def __call__(self) -> dict[str, Any] | None:
        """Run; returns the summary on rank 0.

        Raises SystemExit if the run is stopped before its end, with the code on which the batch script requeues;
        submitit then writes no result, as there will be one later.
        """
        try:
            code = run_job(self.recipe, self.folder, self.settings)
        except ProcessLostError as error:
            sys.stderr.write(one_line(f"oialr: error: {error}") + "\n")
            raise SystemExit(PROCESS_LOST) from error
        if code != FINISHED:
            raise SystemExit(code)
        return RunFolder(self.folder).read_summary() if launch_info().rank == 0 else None


def run_job(recipe: str | Path, folder: Path, settings: Sequence[str] = ()) -> int:
    """Start a run, or resume the one in ``folder``, on the launcher's processes; its exit code.

    Raises :class:`OIALRError`, whose code is ``exit_codes.of_error``.
    """
    from hpc_oialr.record.owner import Claim
    from hpc_oialr.train.load_config import load_config
    from hpc_oialr.train.run import train_or_resume

    loaded = load_config(recipe, settings)
    with stop_requests(loaded) as stop:
        result = train_or_resume(loaded, folder, stop=stop, claim=Claim("a submitted job", job_over))
        return STOPPED if result.summary is None else FINISHED


@contextmanager
def stop_requests(loaded: LoadedConfig) -> Iterator[StopRequest]:
    """What stops a run early: signals, Ctrl-C, a closed terminal, the end of the job.

    Raises :class:`ConfigError` now if ``OIALR_MAX_REQUEUES``, which is read at the end, is no number.
    """
    from hpc_oialr.train.timing import StopRequest

    def reason() -> str:
        return "Ctrl-C" if flag.name == "INT" else flag.name and f"signal {flag.name}"

    max_requeues()
    with catch_signals((loaded.config.train.stop_signal, *NAMES, "INT"), _interrupted) as flag:
        yield StopRequest(reason, job_end())


def _interrupted() -> None:
    """Called by a signal handler, so Python's buffers are bypassed."""
    if launch_info().rank == 0:
        with suppress(OSError):
            os.write(2, b"\noialr: a checkpoint is written after this step; Ctrl-C again: end at once\n")


def job_end(environ: Mapping[str, str] | None = None) -> float | None:
    """Unix time at which this process's job ends (s); None without a job or a limit.

    Rank 0 asks Slurm if the job's variables do not tell, or the time is past because the limit was extended; other
    ranks do not, since a thousand questions at once would slow Slurm down.
    """
    job = slurm_job(environ)
    if job is None:
        return None
    if job.end is not None and job.end > time.time():
        return job.end
    return end_of(job.id) if launch_info(environ).rank == 0 else None
