"""Runs of batch scripts get a ``job.json`` too, so that ``oialr jobs`` shows them beside those of ``oialr submit``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hpc_oialr.distributed.environment import launch_info
from hpc_oialr.distributed.slurm_job import max_requeues, slurm_job
from hpc_oialr.errors import DataError
from hpc_oialr.launch.job_file import JobFile, read_job
from hpc_oialr.launch.scontrol import show_job
from hpc_oialr.record.run_folder import RunFolder


def note_job(folder: Path, recipe: str, environ: Mapping[str, str] | None = None) -> None:
    """Write down which job of Slurm works in a run's folder; the main process does, and only where there is one."""
    job, info = slurm_job(environ), launch_info(environ)
    if job is None or info.rank != 0:
        return
    run_folder = RunFolder(folder)
    if _noted(run_folder) == job.id:
        return
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


def _noted(folder: RunFolder) -> str | None:
    try:
        return read_job(folder).job_id
    except DataError:
        return None
