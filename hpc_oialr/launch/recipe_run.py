"""The call that submitit carries to the job: one run of a recipe in its folder."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_oialr.distributed.environment import launch_info
from hpc_oialr.errors import ProcessLostError
from hpc_oialr.exit_codes import FINISHED, PROCESS_LOST
from hpc_oialr.record.run_folder import RunFolder
from hpc_oialr.redaction import one_line


@dataclass(frozen=True)
class RecipeRun:
    """A run, from its start or from where an earlier job left it; the same call after every requeue.

    Parameters
    ----------
    recipe
        Name or path.
    folder
        The run's.
    settings
        As on the command line.
    """

    recipe: str
    folder: Path
    settings: tuple[str, ...]

    def __call__(self) -> dict[str, Any] | None:
        """Run; the summary on the main process.

        Raises
        ------
        SystemExit
            If it was stopped before its end, with the exit code on which the batch script requeues. submitit
            then writes no result: there will be one.
        OIALRError
            If it cannot go on.
        """
        from hpc_oialr.launch.job_main import run_job

        try:
            code = run_job(self.recipe, self.folder, self.settings)
        except ProcessLostError as error:
            sys.stderr.write(one_line(f"oialr: error: {error}") + "\n")
            raise SystemExit(PROCESS_LOST) from error
        if code != FINISHED:
            raise SystemExit(code)
        return RunFolder(self.folder).read_summary() if launch_info().rank == 0 else None
