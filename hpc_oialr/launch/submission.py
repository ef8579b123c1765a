"""Submit runs: checked on the login node, one folder a run, one job or one job array."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from hpc_oialr.distributed.signals import catch_signals
from hpc_oialr.errors import ConfigError, MissingExtraError, OIALRError
from hpc_oialr.launch.job_file import JobFile, read_job
from hpc_oialr.launch.job_main import RecipeRun
from hpc_oialr.launch.jobs import states_of
from hpc_oialr.launch.request import Request, check_folder
from hpc_oialr.launch.site import ClusterConfig, at_site, read_site
from hpc_oialr.launch.slurm import Slurm, job_over
from hpc_oialr.record.owner import Claim
from hpc_oialr.record.run_folder import RunFolder, default_folder

if TYPE_CHECKING:
    from submitit import Job


@overload
def submit(
    recipe: str | Path, settings: Sequence[str] = ..., *, dry_run: Literal[False] = ..., **parameters: Any
) -> list[Job[Any]]: ...


@overload
def submit(recipe: str | Path, settings: Sequence[str] = ..., *, dry_run: Literal[True], **parameters: Any) -> str: ...


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
        Return the batch script instead of submitting it.
    parameters
        Those of :class:`Request`, e.g. ``nodes=4, gpus_per_node=4, time="04:00:00"``.

    Returns
    -------
    list of submitit.Job, or str
        ``job.result()`` waits for the run's summary, also over requeues.

    Raises
    ------
    OIALRError
        If a parameter, a setting or a folder does not fit, and if Slurm refuses the job.
    """
    submission = Submission.of(recipe, settings, Request.of(**parameters))
    return submission.script() if dry_run else submission.submit()


@dataclass(frozen=True)
class Submission:
    """Runs that are submitted together."""

    request: Request  # completed by the site's options
    site: ClusterConfig  # the other options
    folder: Path  # of the run, or of an array's runs
    runs: tuple[RecipeRun, ...]
    signal: str  # sent to the processes before the end of their job

    @classmethod
    def of(cls, recipe: str | Path, settings: Sequence[str], request: Request) -> Submission:
        """Check all that can be checked before a job starts; raises :class:`OIALRError`."""
        from hpc_oialr.data.batches import check_shares
        from hpc_oialr.train.load_config import load_config

        request, site = at_site(request, read_site(request.site))
        loaded, section = load_config(recipe, settings), "engine"
        train = loaded.config.train
        try:
            shares = loaded.config.engine.shares(request.processes)
            section = "train"
            check_shares(train.global_batch, shares)
            train.check_accumulation(shares)
        except ConfigError as error:
            raise error.in_section(section, loaded.origins) from None
        found = str(Path(recipe).resolve()) if Path(recipe).is_file() else str(recipe)
        folder = Path(request.folder or default_folder(str(recipe))).absolute()
        check_folder(folder)
        runs = [RecipeRun(found, folder, tuple(settings))]
        if request.seeds is not None:
            runs = [
                RecipeRun(found, folder / f"seed_{seed}", (*settings, "--train.seed", str(seed)))
                for seed in request.seeds
            ]
        if find_spec("submitit") is None:
            raise MissingExtraError("submitit", "slurm", purpose="Submitting a run")
        return cls(request, site, folder, tuple(runs), train.stop_signal)

    def script(self) -> str:
        """The batch script; raises :class:`ConfigError` with an executor that has none."""
        if self.request.executor != "slurm":
            rule = "has no batch script to look at"
            raise ConfigError("executor", self.request.executor, rule, fix="Take the executor 'slurm'.")
        from hpc_oialr.launch.executors import batch_script, make_executor

        return batch_script(make_executor(self), len(self.runs))

    def submit(self) -> list[Job[Any]]:
        """Submit; each run folder then holds its ``job.json``.

        Raises :class:`OIALRError` if a folder is in use, or Slurm refuses the job.
        """
        for run in self.runs:
            _check_free(run)
        from hpc_oialr.launch.executors import make_executor, submit_runs

        new, executor = not self.folder.exists(), make_executor(self)
        folders = [RunFolder(run.folder) for run in self.runs]
        with ExitStack() as stack:
            # Ctrl-C takes effect before or after: a job whose folder does not name it would run unnoticed.
            stack.enter_context(catch_signals(("INT", "TERM", "HUP"), _tell))
            claim = Claim("oialr submit", job_over)
            held = [stack.enter_context(closing(claim.take(folder))) for folder in folders]
            # Readable by the owner only.
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.files.mkdir(mode=0o700, exist_ok=True)
            for folder in folders:
                folder.create()
            try:
                jobs = submit_runs(executor, self.runs)
            except (OIALRError, OSError):
                stack.close()
                if new:
                    self._remove_made(folders)
                raise
            for folder, ownership, job in zip(folders, held, jobs, strict=True):
                JobFile(
                    job_id=job.job_id,
                    executor=self.request.executor,
                    recipe=self.runs[0].recipe,
                    processes=self.request.processes,
                    max_requeues=self.request.max_requeues,
                    # submitit's names.
                    output=self.files / f"{job.job_id}_%t_log.%s",
                ).write(folder)
                if self.request.executor == "slurm":
                    ownership.hand_over(job.job_id)
        return jobs

    @property
    def files(self) -> Path:
        """Where submitit keeps its files."""
        return self.folder / "submitit"

    def _remove_made(self, folders: Sequence[RunFolder]) -> None:
        """Remove what :meth:`submit` made; files that somebody else has put there stay."""
        shutil.rmtree(self.files, ignore_errors=True)
        made = [path for folder in folders for path in (folder.logs, folder.checkpoints)]
        for path in (*made, *(folder.path for folder in folders), self.folder):
            with suppress(OSError):
                path.rmdir()


def _check_free(run: RecipeRun) -> None:
    """Raise unless the folder is new, or holds this very run, unfinished and without a job that works on it."""
    folder = RunFolder(run.folder)
    folder.require_new()
    if folder.finished:
        raise OIALRError(f"{folder.path} holds a finished run. Take another folder, or remove it.")
    if folder.holds_run:
        from hpc_oialr.train.load_config import load_config
        from hpc_oialr.train.same_run import require_same_run

        require_same_run(load_config(folder.config), load_config(run.recipe, run.settings), folder.path)
    if folder.job.exists():
        job = read_job(folder)
        (state,) = states_of([job], Slurm())
        if not state.over:
            raise OIALRError(
                f"job {job.job_id} ({state.state.lower()}) works in {folder.path}; one job a folder. "
                f"Wait for it, or end it: oialr cancel {shlex.quote(str(folder.path))}"
            )


def _tell() -> None:
    with suppress(OSError):
        os.write(2, b"\noialr: the job is being submitted; oialr cancel ends it, Ctrl-C again: end at once\n")
