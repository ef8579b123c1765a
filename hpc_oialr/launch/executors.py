"""submitit's executors, set for runs: one process a GPU, requeued by the batch script, results read safely."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from submitit import DebugExecutor, Executor, LocalExecutor, LocalJob, SlurmExecutor, SlurmJob
from submitit.core.core import Job
from submitit.core.utils import DelayedSubmission
from submitit.slurm.slurm import SlurmInfoWatcher, _make_sbatch_string

from hpc_oialr.distributed.environment import all_variables
from hpc_oialr.errors import ConfigError
from hpc_oialr.launch.pickle_safety import require_own
from hpc_oialr.launch.request import Request
from hpc_oialr.launch.script import SRUN_ARGUMENTS, python, setup_lines
from hpc_oialr.launch.site import ClusterConfig
from hpc_oialr.launch.slurm_state import Slurm
from hpc_oialr.launch.slurm_time import limit_of


class SlurmWatcher(SlurmInfoWatcher):
    """Asks squeue first: without accounts submitit itself would wait for ever for a job that was killed."""

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


class _OwnPickles(Job[Any]):
    """A job whose pickles are read only if nobody else can have written them."""

    def submission(self) -> DelayedSubmission:
        """What was submitted."""
        require_own(self.paths.folder, self.paths.submitted_pickle)
        return super().submission()

    def _get_outcome_and_result(self) -> tuple[str, Any]:
        there = [path for path in (self.paths.result_pickle,) if path.exists()]
        require_own(self.paths.folder, *there)
        return super()._get_outcome_and_result()


class OwnSlurmJob(_OwnPickles, SlurmJob[Any]):
    """A job of Slurm."""

    watcher = SlurmWatcher()


class OwnLocalJob(_OwnPickles, LocalJob[Any]):
    """A job on this machine."""


# They make arrays, wait for the job's end, or go over --requeue and --time.
_NEVER = {"SBATCH_ARRAY_INX", "SBATCH_WAIT", "SBATCH_NO_REQUEUE", "SBATCH_TIMELIMIT"}


class RunsOnSlurm(SlurmExecutor):
    """Starts runs by srun inside a batch script."""

    job_class = OwnSlurmJob

    @property
    def _submitit_command_str(self) -> str:
        return python("hpc_oialr.launch.task", str(self.folder))

    @classmethod
    def affinity(cls) -> int:
        """Positive without srun too: a script may be looked at anywhere."""
        return 2

    def script(self, runs: int) -> str:
        """The batch script of a run, or of an array of several."""
        many: dict[str, Any] = {"map_count": runs} if runs > 1 else {}
        return _make_sbatch_string(self._submitit_command_str, self.folder, **self.parameters, **many)

    def submit_runs(self, calls: list[Any]) -> list[Job[Any]]:
        """Submit one run, or several as an array."""
        with only_as_written(self.script(len(calls))):
            jobs = self.submit_array(calls)
        return [OwnSlurmJob(self.folder, job.job_id, range(job.num_tasks)) for job in jobs]


@contextmanager
def only_as_written(script: str) -> Iterator[None]:
    """Let no ``SBATCH_*`` variable of the user's shell go over a batch script's own lines, as sbatch would.

    Those that the script leaves open, an account or a partition say, stay.

    Raises
    ------
    ConfigError
        If they send the job to another cluster than the one that is asked about it.
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


class RunsHere(LocalExecutor):
    """Starts runs on this machine, in the background."""

    job_class = OwnLocalJob

    @property
    def _submitit_command_str(self) -> str:
        return python("hpc_oialr.launch.task", str(self.folder))


def make_executor(request: Request, site: ClusterConfig, folder: Path, name: str, signal: str) -> Executor:
    """The executor of a request.

    Parameters
    ----------
    site
        Options of the cluster that the request does not hold.
    folder
        Where submitit keeps its files.
    name
        Of the job.
    signal
        What its processes get before its end, e.g. "USR2".

    Raises
    ------
    ConfigError
        If the executor cannot send the signal.
    """
    match request.executor:
        case "slurm":
            executor: Executor = RunsOnSlurm(folder)
            executor.update_parameters(**slurm_parameters(request, site, name, signal))
        case "local":
            if signal != "USR2":
                rule = "must be USR2 with the executor 'local', which sends no other"
                raise ConfigError("train.stop_signal", signal, rule)
            executor = RunsHere(folder)
            executor.update_parameters(**local_parameters(request))
        case _:
            executor = DebugExecutor(folder)
    return executor


def slurm_parameters(request: Request, site: ClusterConfig, name: str, signal: str) -> dict[str, Any]:
    """Parameters of submitit's SlurmExecutor; it renders a script with them at once."""
    given = {key: getattr(request, key) for key in ("partition", "account", "qos", "constraint", "exclude")}
    return {
        **given,
        "job_name": name,
        "nodes": request.nodes,
        "ntasks_per_node": request.processes_per_node,
        "cpus_per_task": request.cpus_per_task,
        # Not per task: NCCL must see all GPUs of its node.
        "gpus_per_node": request.gpus_per_node,
        "time": math.ceil(request.time_s / 60),
        # Clusters that check such keys do not know submitit's.
        "wckey": None,
        "setup": setup_lines(request, site),
        "srun_args": [*SRUN_ARGUMENTS, *site.srun],
        "additional_parameters": {
            **{option: value or True for option, value in site.sbatch.items()},
            "signal": f"{signal}@{request.signal_s}",
            "time": limit_of(request.time_s),
            "requeue": True,
        },
    }


def local_parameters(request: Request) -> dict[str, Any]:
    """Parameters of submitit's LocalExecutor."""
    return {
        "tasks_per_node": request.processes_per_node,
        "gpus_per_node": request.gpus,
        "timeout_min": request.time_s / 60,
        "signal_delay_s": request.signal_s,
    }
