"""Submitting runs: checked on the login node, one folder a run, one job or one job array."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, closing, redirect_stderr, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from hpc_oialr.distributed.signals import catch_signals
from hpc_oialr.errors import ConfigError, MissingExtraError, OIALRError
from hpc_oialr.launch.checks import check_free, check_settings
from hpc_oialr.launch.job_file import JobFile
from hpc_oialr.launch.recipe_run import RecipeRun
from hpc_oialr.launch.request import Request, check_folder
from hpc_oialr.launch.site import ClusterConfig, at_site, read_site
from hpc_oialr.launch.states import job_over
from hpc_oialr.record.owner import Claim
from hpc_oialr.record.run_folder import RunFolder, default_folder

if TYPE_CHECKING:
    from submitit import Executor, Job


@overload
def submit(
    recipe: str | Path, settings: Sequence[str] = ..., *, dry_run: Literal[False] = ..., **parameters: Any
) -> list[Job[Any]]: ...


@overload
def submit(
    recipe: str | Path, settings: Sequence[str] = ..., *, dry_run: Literal[True], **parameters: Any
) -> str: ...


def submit(
    recipe: str | Path, settings: Sequence[str] = (), *, dry_run: bool = False, **parameters: Any
) -> list[Job[Any]] | str:
    """Submit a run, or one for each seed.

    Parameters
    ----------
    recipe
        Name or path of a recipe.
    settings
        As on the command line, e.g. ``["--train.epochs", "3"]``.
    dry_run
        Submit nothing; the batch script instead.
    parameters
        Those of :class:`Request`, e.g. ``nodes=4, gpus_per_node=4, time="04:00:00"``.

    Returns
    -------
    list of submitit.Job, or str
        ``job.result()`` waits for the run's summary, also over requeues.

    Raises
    ------
    OIALRError
        For a parameter, a setting or a folder that does not fit, and if Slurm refuses the job.
    """
    submission = Submission.of(recipe, settings, Request.of(**parameters))
    return submission.script() if dry_run else submission.submit()


@dataclass(frozen=True)
class Submission:
    """Runs that will be submitted together.

    Attributes
    ----------
    request
        Where, how wide and how long; what it left open, as the site has it.
    site
        Its other options.
    folder
        The run's, or the one that holds those of an array.
    runs
        What each job calls.
    signal
        What the processes get before the end of their job.
    """

    request: Request
    site: ClusterConfig
    folder: Path
    runs: tuple[RecipeRun, ...]
    signal: str

    @classmethod
    def of(cls, recipe: str | Path, settings: Sequence[str], request: Request) -> Submission:
        """Check everything that can be checked before a job starts.

        Raises
        ------
        OIALRError
            For what does not fit.
        """
        request, site = at_site(request, read_site(request.site))
        train = check_settings(recipe, settings, request.processes)
        found = str(Path(recipe).resolve()) if Path(recipe).is_file() else str(recipe)
        folder = Path(request.folder or default_folder(str(recipe))).absolute()
        check_folder(folder)
        runs = [(folder, tuple(settings))]
        if request.seeds is not None:
            seeds = [(f"seed_{seed}", ("--train.seed", str(seed))) for seed in request.seeds]
            runs = [(folder / name, (*settings, *seed)) for name, seed in seeds]
        return cls(request, site, folder, tuple(RecipeRun(found, *run) for run in runs), train.stop_signal)

    def script(self) -> str:
        """The batch script.

        Raises
        ------
        OIALRError
            With an executor that has none.
        """
        executor = self._executor()
        script = getattr(executor, "script", None)
        if script is None:
            rule = "has no batch script to look at"
            raise ConfigError("executor", self.request.executor, rule, fix="Take the executor 'slurm'.")
        return str(script(len(self.runs)))

    def submit(self) -> list[Job[Any]]:
        """Submit; each run's folder then holds its ``job.json``.

        Raises
        ------
        OIALRError
            If a folder is in use, or Slurm refuses the job.
        """
        for run in self.runs:
            check_free(run)
        new, executor = not self.folder.exists(), self._executor()
        folders = [RunFolder(run.folder) for run in self.runs]
        with ExitStack() as stack:
            # A job that Slurm has and no folder knows of would run on unseen: Ctrl-C counts before or after.
            stack.enter_context(catch_signals(("INT", "TERM", "HUP"), _tell))
            claim = Claim("oialr submit", job_over)
            held = [stack.enter_context(closing(claim.take(folder))) for folder in folders]
            self._prepare()
            try:
                jobs = _submit(executor, self.runs)
            except (OIALRError, OSError):
                stack.close()
                if new:
                    self._remove_made()
                raise
            for folder, ownership, job in zip(folders, held, jobs, strict=True):
                self._job_file(job.job_id).write(folder)
                if self.request.executor == "slurm":
                    ownership.hand_over(job.job_id)
        return jobs

    @property
    def _files(self) -> Path:
        return self.folder / "submitit"

    def _executor(self) -> Executor:
        try:
            from hpc_oialr.launch.executors import make_executor
        except ImportError as error:
            if error.name is None or error.name.partition(".")[0] != "submitit":
                raise
            raise MissingExtraError("submitit", "slurm", purpose="Submitting a run") from None
        return make_executor(self.request, self.site, self._files, self.folder.name, self.signal)

    def _prepare(self) -> None:
        """Make the folders, readable by their owner only."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._files.mkdir(mode=0o700, exist_ok=True)
        for run in self.runs:
            RunFolder(run.folder).create()

    def _remove_made(self) -> None:
        """What :meth:`_prepare` made and submitit has put there; nothing else."""
        shutil.rmtree(self._files, ignore_errors=True)
        made = [
            path
            for run in self.runs
            for path in (RunFolder(run.folder).logs, RunFolder(run.folder).checkpoints)
        ]
        for folder in (*made, *(run.folder for run in self.runs), self.folder):
            # What somebody else has put there meanwhile stays.
            with suppress(OSError):
                folder.rmdir()

    def _job_file(self, job_id: str) -> JobFile:
        return JobFile(
            job_id=job_id,
            executor=self.request.executor,
            recipe=self.runs[0].recipe,
            processes=self.request.processes,
            max_requeues=self.request.max_requeues,
            # As submitit calls them.
            output=self._files / f"{job_id}_%t_log.%s",
        )


def _tell() -> None:
    with suppress(OSError):
        os.write(2, b"\noialr: the job is being submitted; oialr cancel ends it, Ctrl-C again: end at once\n")


def _submit(executor: Executor, runs: Sequence[RecipeRun]) -> list[Job[Any]]:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    submit_runs = getattr(executor, "submit_runs", executor.submit_array)
    try:
        # submitit shows sbatch's message by itself too.
        with redirect_stderr(StringIO()):
            return list(submit_runs(list(runs)))
    except (FailedJobError, FailedSubmissionError) as error:
        raise OIALRError(
            f"Slurm refused the job: {' '.join(str(error).split()) or 'sbatch says no reason'}"
        ) from None
