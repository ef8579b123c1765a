"""submitit's executors, configured for runs: one process per GPU, requeued by the batch script, results read safely."""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from submitit import DebugExecutor, Executor, LocalExecutor, LocalJob, SlurmExecutor, SlurmJob
from submitit.core.core import Job
from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmInfoWatcher, _make_sbatch_string

from hpc_oialr.distributed.environment import all_variables
from hpc_oialr.errors import ConfigError, OIALRError
from hpc_oialr.launch.slurm import Slurm
from hpc_oialr.launch.task import require_own

if TYPE_CHECKING:
    from hpc_oialr.launch.submission import Submission

_JOB = Path(__file__).with_name("job.sh")
# In the place of the interpreter that runs submitit's main program; the folder is the last argument of both.
_TASK = shlex.join([sys.executable, "-u", "-m", "hpc_oialr.launch.task"])
# They make arrays, wait for the job's end, or override --requeue and --time.
_NEVER = {"SBATCH_ARRAY_INX", "SBATCH_WAIT", "SBATCH_NO_REQUEUE", "SBATCH_TIMELIMIT"}


class SlurmWatcher(SlurmInfoWatcher):
    """Asks squeue first: without accounting submitit itself would wait for a killed job forever."""

    def __init__(self, delay_s: int = 60) -> None:
        super().__init__(delay_s)
        self._slurm = Slurm()

    def update(self) -> None:
        """Ask for the states of all jobs that may still run."""
        asked = self._registered - self._finished
        states = self._slurm.states(asked)
        for job in asked:
            if job in states:
                self._info_dict[job] = {"JobID": job, "State": states[job].state}
            elif self._slurm.reached:
                self._info_dict[job] = {"JobID": job, "State": "FORGOTTEN"}
            if self.is_done(job, mode="cache"):
                self._finished.add(job)
        self._last_status_check = time.time()


class _RunJob(Job[Any]):
    """A run, of any number of processes; its pickles are read only if nobody else can have written them."""

    def result(self) -> Any:
        """What the first process returns; submitit's own refuses with several."""
        return self.results()[0]

    def submission(self) -> DelayedSubmission:
        """What was submitted."""
        require_own(self.paths.folder, self.paths.submitted_pickle)
        return super().submission()

    def _get_outcome_and_result(self) -> tuple[str, Any]:
        result = self.paths.result_pickle
        require_own(self.paths.folder, *([result] if result.exists() else []))
        return super()._get_outcome_and_result()


class OwnSlurmJob(_RunJob, SlurmJob[Any]):
    """A job of Slurm."""

    watcher = SlurmWatcher()


class OwnLocalJob(_RunJob, LocalJob[Any]):
    """A job on this machine."""


class RunsOnSlurm(SlurmExecutor):
    """Starts runs by srun inside a batch script."""

    @classmethod
    def affinity(cls) -> int:
        """Positive without srun, too: a dry run works anywhere."""
        return 2


def make_executor(submission: Submission) -> Executor:
    """The executor of a submission; raises :class:`ConfigError` if it cannot send the run's signal."""
    request, folder = submission.request, submission.files
    match request.executor:
        case "slurm":
            executor: Executor = RunsOnSlurm(folder, python=_TASK)
            # submitit renders a script with them at once.
            executor.update_parameters(**_slurm_parameters(submission))
        case "local":
            if submission.signal != "USR2":
                rule = "must be USR2 with the executor 'local', which sends no other"
                raise ConfigError("train.stop_signal", submission.signal, rule)
            executor = LocalExecutor(folder, python=_TASK)
            executor.update_parameters(
                tasks_per_node=request.processes_per_node,
                gpus_per_node=request.gpus,
                visible_gpus=tuple(request.visible_gpus),
                timeout_min=request.time_s / 60,
                signal_delay_s=request.signal_s,
            )
        case _:
            executor = DebugExecutor(folder)
    return executor


def _slurm_parameters(submission: Submission) -> dict[str, Any]:
    request, site = submission.request, submission.site
    # job.sh comes first, so that it sees a site file that fails, too.
    sources = [_JOB] if site.file is None else [_JOB, site.file]
    return {
        **{key: getattr(request, key) for key in ("partition", "account", "qos", "constraint", "exclude")},
        "job_name": submission.folder.name,
        "nodes": request.nodes,
        "ntasks_per_node": request.processes_per_node,
        "cpus_per_task": request.cpus_per_task,
        # Not per task: NCCL must see all GPUs of its node.
        "gpus_per_node": request.gpus_per_node,
        # For submitit, in minutes; the script has the one below.
        "time": math.ceil(request.time_s / 60),
        # Clusters that check such keys do not know submitit's.
        "wckey": None,
        "setup": [
            f"export OIALR_MAX_REQUEUES={request.max_requeues}",
            "set -eo pipefail",
            *(f"source {shlex.quote(str(file))}" for file in sources),
            *request.setup,
        ],
        # By default srun would empty the log files that were written before a requeue.
        "srun_args": ["--open-mode=append", *site.srun],
        "additional_parameters": {
            **{option: value or True for option, value in site.sbatch.items()},
            "signal": f"{submission.signal}@{request.signal_s}",
            "time": request.time.strip(),
            "requeue": True,
        },
    }


def batch_script(executor: Executor, runs: int) -> str:
    """The batch script of a run, or of an array of several."""
    assert isinstance(executor, SlurmExecutor)
    many: dict[str, Any] = {"map_count": runs} if runs > 1 else {}
    command = executor._submitit_command_str
    return str(_make_sbatch_string(command, executor.folder, **executor.parameters, **many))


def submit_runs(executor: Executor, calls: Sequence[Callable[[], Any]]) -> list[Job[Any]]:
    """Submit one run, or several as an array; raises :class:`OIALRError` if Slurm refuses."""
    with_slurm = isinstance(executor, SlurmExecutor)
    variables = only_as_written(batch_script(executor, len(calls))) if with_slurm else nullcontext()
    try:
        # submitit prints sbatch's message, which the error holds.
        with variables, redirect_stderr(StringIO()):
            jobs = executor.submit_array(calls)
    except (FailedJobError, FailedSubmissionError) as error:
        reason = " ".join(str(error).split()) or "sbatch says no reason"
        raise OIALRError(f"Slurm refused the job: {reason}") from None
    return [_own(job) for job in jobs]


def _own(job: Job[Any]) -> Job[Any]:
    tasks = range(job.num_tasks)
    match job:
        case SlurmJob():
            return OwnSlurmJob(job.paths.folder, job.job_id, tasks)
        case LocalJob():
            return OwnLocalJob(job.paths.folder, job.job_id, tasks, job._process)
    return job


@contextmanager
def only_as_written(script: str) -> Iterator[None]:
    """Hide ``SBATCH_*`` variables that would override lines of the script; those for other options stay.

    Raises :class:`ConfigError` if they send the job to another cluster than the one that is asked about it.
    """
    given = all_variables()
    if given.get("SBATCH_CLUSTERS", here := given.get("SLURM_CLUSTERS", "")) != here:
        rule = f"must be that of SLURM_CLUSTERS, {here!r}, which squeue and scancel read"
        raise ConfigError("SBATCH_CLUSTERS", given["SBATCH_CLUSTERS"], rule, fix="Set both, or neither.")
    options = re.findall(r"^#SBATCH --([\w-]+)", script, flags=re.MULTILINE)
    names = {f"SBATCH_{option.upper().replace('-', '_')}" for option in options} | _NEVER
    taken = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)
