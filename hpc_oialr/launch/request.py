"""What a run asks of the cluster; checked when it is made, on the login node."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hpc_oialr.distributed.slurm import gpu_count
from hpc_oialr.errors import ConfigError, UnknownNameError
from hpc_oialr.launch.slurm import FORMS, seconds_of

EXECUTORS = ("slurm", "local", "debug")
_GPUS = re.compile(r"([\w.-]+:)?\d+")


@dataclass(frozen=True, kw_only=True)
class Request:
    """Where, how wide and how long.

    Parameters
    ----------
    folder
        Run folder; default ``runs/RECIPE-TIME``. An unfinished run in it is resumed.
    executor
        "slurm"; "local": in the background on this machine; "debug": in this process.
    nodes
        Number of nodes.
    gpus_per_node
        GPUs of each node, e.g. 4 or "a100:4"; default none.
    tasks_per_node
        Processes of each node; default one per GPU, or one without GPUs.
    cpus_per_task
        Cores of each process; default the cluster's.
    time
        Time limit of the job, in Slurm's forms; a longer run is stopped and requeued.
    partition, account, qos, constraint, exclude
        As in sbatch; default the cluster's, or Slurm's variables, e.g. ``SBATCH_ACCOUNT``.
    array
        ``{"seeds": [0, 1, 2]}``: a job array with one run, in a folder of its own, for each seed.
    signal_s
        Time before the end of the job at which its processes get ``train.stop_signal`` (s).
    max_requeues
        A job that is stopped again after this many requeues stays stopped.
    site
        Name or path of the cluster's site file, sourced by the job.
    setup
        Shell commands that the job runs before the training.
    visible_gpus
        With the executor "local": numbers of the GPUs that the run may use; default the first ones.

    ConfigError with the value, its rule and the fix, if one does not fit.
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
    visible_gpus: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name in ("nodes", "tasks_per_node", "cpus_per_task", "signal_s", "max_requeues"):
            value, least = getattr(self, name), 0 if name == "max_requeues" else 1
            if value is not None and not (_is_whole(value) and value >= least):
                raise ConfigError(name, value, f"must be a whole number, at least {least}")
        gpus = self.gpus_per_node
        if gpus is not None and (isinstance(gpus, bool) or not _GPUS.fullmatch(str(gpus))):
            rule = "must be a number of GPUs, or TYPE:NUMBER"
            raise ConfigError("gpus_per_node", gpus, rule, fix="E.g. a100:4.")
        seconds = seconds_of(self.time) if isinstance(self.time, str) else None
        if seconds is None:
            raise ConfigError("time", self.time, f"must be {FORMS}", fix="E.g. 04:00:00.")
        if seconds <= self.signal_s:
            rule = f"must be longer than signal_s, the {self.signal_s} s before the end at which it is warned"
            raise ConfigError("time", self.time, rule)
        for name in ("partition", "account", "qos", "constraint", "exclude", "site"):
            if (value := getattr(self, name)) is not None:
                check_line(name, str(value))
        if isinstance(self.setup, str):
            rule = "must be a list of shell commands"
            raise ConfigError("setup", self.setup, rule, fix="Put it in brackets.")
        if self.folder is not None:
            check_folder(Path(self.folder))
        self._check_seeds()
        self._check_executor()

    def _check_seeds(self) -> None:
        if self.array is None:
            return
        for name in self.array:
            if name != "seeds":
                raise UnknownNameError("array", name, ["seeds"])
        seeds = list(self.array.get("seeds", ()))
        if not seeds or len(set(seeds)) < len(seeds) or not all(_is_whole(s) and s >= 0 for s in seeds):
            rule = "must be different whole numbers, none below 0"
            raise ConfigError("array", dict(self.array), rule, fix="E.g. seeds=0,1,2.")

    def _check_executor(self) -> None:
        if self.executor not in EXECUTORS:
            raise UnknownNameError("executor", str(self.executor), EXECUTORS)
        if self.executor == "slurm":
            if self.visible_gpus:
                rule = "is for the executor 'local': Slurm chooses the GPUs of a job"
                raise ConfigError("visible_gpus", self.visible_gpus, rule, fix="Leave it out.")
            return
        here = f"with the executor {self.executor!r}, which works on this machine"
        for name, only in (("nodes", 1), ("site", None), ("setup", ())):
            if (value := getattr(self, name)) != only and (value or only):
                rule = f"must be {only or 'left out'} {here}"
                raise ConfigError(name, value, rule, fix="Take the executor 'slurm'.")
        if self.executor == "debug" and self.processes_per_node > 1:
            rule = f"must be 1 {here}, in this process"
            raise ConfigError("tasks_per_node", self.processes_per_node, rule, fix="Take the executor 'local'.")

    @classmethod
    def of(cls, **parameters: Any) -> Request:
        """A request from keyword arguments; raises :class:`UnknownNameError` with all names and defaults."""
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
        """Time limit of the job (s)."""
        seconds = seconds_of(self.time)
        assert seconds is not None
        return seconds


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_line(name: str, text: str) -> None:
    """Raise :class:`ConfigError` if a text cannot stand in a line of a batch script's header."""
    if not text or any(ord(char) < 32 or ord(char) == 127 for char in text):
        rule = "must be one line of text: Slurm reads a header line by line"
        raise ConfigError(name, text, rule, fix="Remove line breaks and control characters.")


def check_folder(folder: Path) -> None:
    """Raise :class:`ConfigError` if Slurm could not write its log files into a run folder."""
    check_line("folder", str(folder))
    if any(char in str(folder) for char in "%\\"):
        rule = "must hold neither % nor \\: Slurm reads them as patterns in the names of log files"
        raise ConfigError("folder", str(folder), rule)
