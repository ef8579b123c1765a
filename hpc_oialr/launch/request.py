"""What is asked of the cluster for a run; checked when it is made, on the login node."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hpc_oialr.distributed.slurm_lists import gpu_count
from hpc_oialr.errors import ConfigError, UnknownNameError
from hpc_oialr.launch.slurm_time import FORMS, seconds_of

EXECUTORS = ("slurm", "local", "debug")
_GPUS = re.compile(r"([\w.-]+:)?\d+")


@dataclass(frozen=True, kw_only=True)
class Request:
    """Where, how wide and how long.

    Parameters
    ----------
    folder
        Run folder; default ``runs/RECIPE-TIME``. One that holds an unfinished run is gone on with.
    executor
        "slurm"; "local": in the background on this machine; "debug": in this process.
    nodes
        Number of nodes.
    gpus_per_node
        GPUs of each node, e.g. 4 or "a100:4"; None asks for none.
    tasks_per_node
        Processes of each node; default one a GPU, or one.
    cpus_per_task
        Cores of each process; None leaves it to the cluster.
    time
        Limit of the job, in Slurm's forms; a run that takes longer is stopped and requeued.
    partition, account, qos, constraint, exclude
        As in sbatch; None leaves them to the cluster, and to Slurm's variables, e.g. ``SBATCH_ACCOUNT``.
    array
        ``{"seeds": [0, 1, 2]}``: a job array with one run, in a folder of its own, for each seed.
    signal_s
        So long before the end of the job its processes get the run's ``train.stop_signal`` (s).
    max_requeues
        After so many requeues a job that is stopped again stays stopped.
    site
        Name or path of the cluster's site file, sourced by the job.
    setup
        Shell commands of your own that the job runs before the training.

    Raises
    ------
    ConfigError
        With the value, its rule and the fix.
    """

    folder: Path | str | None = None
    executor: str = "slurm"
    nodes: int = 1
    gpus_per_node: int | str | None = None
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str = "01:00:00"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    array: Mapping[str, Sequence[int]] | None = None
    signal_s: int = 120
    max_requeues: int = 20
    site: str | None = None
    setup: Sequence[str] = ()

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_time(self)
        _check_texts(self)
        _check_seeds(self)
        _check_executor(self)

    @classmethod
    def of(cls, **parameters: Any) -> Request:
        """A request from parameters by name.

        Raises
        ------
        UnknownNameError
            For a name that is none; lists all with their defaults.
        """
        valid = {field.name: field.default for field in fields(cls)}
        for name in parameters:
            if name not in valid:
                raise UnknownNameError("parameter of submit", name, valid, defaults=valid)
        return cls(**parameters)

    @property
    def seeds(self) -> tuple[int, ...] | None:
        """Seeds of the array, if it is one."""
        return None if self.array is None else tuple(self.array["seeds"])

    @property
    def gpus(self) -> int:
        """GPUs of each node."""
        return gpu_count(str(self.gpus_per_node or "")) or 0

    @property
    def processes_per_node(self) -> int:
        """Processes of each node."""
        return self.tasks_per_node or max(1, self.gpus)

    @property
    def processes(self) -> int:
        """Processes of a run."""
        return self.nodes * self.processes_per_node

    @property
    def time_s(self) -> int:
        """Limit of the job (s)."""
        seconds = seconds_of(self.time)
        assert seconds is not None
        return seconds


def check_line(name: str, text: str) -> None:
    """Raise :class:`ConfigError` if a text cannot stand in a line of a batch script's header."""
    if not text or any(ord(char) < 32 or ord(char) == 127 for char in text):
        rule = "must be one line of text: Slurm reads a header line by line"
        raise ConfigError(name, text, rule, fix="Remove line breaks and control characters.")


def _check_numbers(request: Request) -> None:
    for name in ("nodes", "tasks_per_node", "cpus_per_task", "signal_s"):
        value = getattr(request, name)
        if value is not None and not (_is_whole(value) and value >= 1):
            raise ConfigError(name, value, "must be a whole number, at least 1")
    if not (_is_whole(request.max_requeues) and request.max_requeues >= 0):
        raise ConfigError("max_requeues", request.max_requeues, "must be a whole number, at least 0")
    gpus = request.gpus_per_node
    if gpus is not None and (isinstance(gpus, bool) or not _GPUS.fullmatch(str(gpus))):
        raise ConfigError(
            "gpus_per_node", gpus, "must be a number of GPUs, or TYPE:NUMBER", fix="E.g. a100:4."
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_time(request: Request) -> None:
    seconds = seconds_of(request.time) if isinstance(request.time, str) else None
    if seconds is None:
        raise ConfigError("time", request.time, f"must be {FORMS}", fix="E.g. 04:00:00.")
    if seconds <= request.signal_s:
        rule = f"must be longer than signal_s, the {request.signal_s} s before the end at which it is warned"
        raise ConfigError("time", request.time, rule)


def _check_texts(request: Request) -> None:
    for name in ("partition", "account", "qos", "constraint", "exclude", "site"):
        value = getattr(request, name)
        if value is not None:
            check_line(name, str(value))
    if isinstance(request.setup, str):
        raise ConfigError(
            "setup", request.setup, "must be a list of shell commands", fix="Put it in brackets."
        )
    if request.folder is not None:
        check_folder(Path(request.folder))


def check_folder(folder: Path) -> None:
    """Raise :class:`ConfigError` if Slurm could not write its log files into a run's folder."""
    check_line("folder", str(folder))
    if any(char in str(folder) for char in "%\\"):
        rule = "must hold neither % nor \\: Slurm reads them as patterns in the names of log files"
        raise ConfigError("folder", str(folder), rule)


def _check_seeds(request: Request) -> None:
    if request.array is None:
        return
    for name in request.array:
        if name != "seeds":
            raise UnknownNameError("array", name, ["seeds"])
    seeds = list(request.array.get("seeds", ()))
    if not seeds or len(set(seeds)) < len(seeds) or not all(_is_whole(seed) and seed >= 0 for seed in seeds):
        rule = "must be different whole numbers, none below 0"
        raise ConfigError("array", dict(request.array), rule, fix="E.g. seeds=0,1,2.")


def _check_executor(request: Request) -> None:
    if request.executor not in EXECUTORS:
        raise UnknownNameError("executor", str(request.executor), EXECUTORS)
    here = f"with the executor {request.executor!r}, which works on this machine"
    if request.executor == "slurm":
        return
    for name, only in (("nodes", 1), ("site", None), ("setup", ())):
        if getattr(request, name) != only and (getattr(request, name) or only):
            rule = f"must be {only or 'left out'} {here}"
            raise ConfigError(name, getattr(request, name), rule, fix="Take the executor 'slurm'.")
    if request.executor == "debug" and request.processes_per_node > 1:
        rule = f"must be 1 {here}, in this process"
        raise ConfigError(
            "tasks_per_node", request.processes_per_node, rule, fix="Take the executor 'local'."
        )
