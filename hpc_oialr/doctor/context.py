"""What a check gets, this process with its variables and options, and what it returns, findings."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from hpc_oialr.commands import Answer, run_command
from hpc_oialr.distributed.environment import LaunchInfo, gpus_per_node, launch_info, node_name
from hpc_oialr.errors import OIALRError, UnknownNameError, WorldError, check_interval
from hpc_oialr.launch.site import read_site

State = Literal["ok", "note", "problem"]
Scope = Literal["process", "node", "main", "slurm"]
STATES: tuple[State, ...] = ("ok", "note", "problem")
SLURM_PROGRAMS = ("sinfo", "sbatch", "srun", "squeue", "scontrol", "scancel")
_NO_GPU = ("", "-1", "NoDevFiles")
_PROBE = Path(__file__).with_name("probe.py")
# Times the timeout: for programs and checks that wait for others.
SLOW = 3


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table."""

    state: State  # "note": worth knowing, runs do without; "problem": a run would fail, hang or be slow
    name: str  # what was checked
    found: str
    fix: str = ""  # one line that puts it right; every problem has one
    nodes: tuple[str, ...] = ()  # where; empty if all ranks agree

    def __post_init__(self) -> None:
        assert self.state in STATES, self.state
        assert self.fix or self.state != "problem", f"no fix for {self.name}"

    @property
    def severity(self) -> int:
        """0, 1 or 2, the worst."""
        return STATES.index(self.state)


ok, note, problem = partial(Finding, "ok"), partial(Finding, "note"), partial(Finding, "problem")


@dataclass(frozen=True, kw_only=True)
class CheckContext:
    """The process that checks are about; raises :class:`ConfigError` if a limit is not positive."""

    environ: Mapping[str, str]  # passed on to programs that a check starts
    folder: Path = Path("runs")  # the run folder, which need not exist
    partition: str | None = None  # None: the cluster's
    need_gib: float = 5.0  # space that the run needs in its folder
    timeout_s: float = 10.0  # for a program; three times as long if it loads torch or starts MPI

    def __post_init__(self) -> None:
        check_interval("need_gib", self.need_gib, 0, float("inf"))
        check_interval("timeout_s", self.timeout_s, 0, float("inf"))

    @classmethod
    def at_site(
        cls, site: str | None, *, folder: Path | None = None, partition: str | None = None, **limits: float
    ) -> tuple[CheckContext, list[Finding]]:
        """This process, with the variables and options that a site file gives batch scripts; whether it runs here.

        Raises :class:`UnknownNameError` that lists the sites if there is none of this name.
        """
        try:
            config = read_site(site, in_job=True)
            findings = [ok("site", f"{site}: its file runs here")] if site else []
        except UnknownNameError:
            raise
        except OIALRError as error:
            config = read_site(None)
            findings = [problem("site", str(error), "module avail   (then correct the site file)")]
        environ = config.environ
        # The site's options stand on sbatch's command line, which overrides its variables.
        context = cls(
            environ=environ,
            folder=folder or Path(environ.get("OIALR_RUNS", "runs")),
            partition=partition or config.sbatch.get("partition") or environ.get("SBATCH_PARTITION"),
            **limits,
        )
        return context, findings

    @cached_property
    def place(self) -> LaunchInfo | None:
        """Rank and world size; None where the launcher's variables contradict each other."""
        try:
            return launch_info(self.environ)
        except WorldError:
            return None

    @property
    def size(self) -> int:
        """Number of processes."""
        return 1 if self.place is None else self.place.size

    @property
    def local_size(self) -> int:
        """Number of processes on this node."""
        return 1 if self.place is None else self.place.local_size

    @property
    def is_main(self) -> bool:
        """Whether this process is rank 0."""
        return self.environ.get("SLURM_PROCID", "0") == "0" if self.place is None else self.place.rank == 0

    def in_scope(self, scope: Scope) -> bool:
        """Whether this process runs checks of a scope."""
        match scope:
            case "process":
                return True
            case "node":
                local = self.environ.get("SLURM_LOCALID", "0")
                return local == "0" if self.place is None else self.place.local_rank == 0
            case "main":
                return self.is_main
            case "slurm":
                # One question to the controller instead of thousands.
                return self.is_main and self.has_slurm

    @property
    def node(self) -> str:
        """Name of its node."""
        return node_name(self.environ)

    @property
    def gpus_asked(self) -> bool:
        """Whether the job has GPUs, by its variables."""
        visible = self.environ.get("CUDA_VISIBLE_DEVICES", "")
        return bool(gpus_per_node(self.environ)) or visible not in _NO_GPU

    @property
    def has_slurm(self) -> bool:
        """Whether any of Slurm's programs is here."""
        return any(self.find(name) for name in SLURM_PROGRAMS)

    def find(self, program: str) -> str | None:
        """Path of a program, if there is one."""
        return shutil.which(program, path=self.environ.get("PATH", os.defpath))

    def run(self, *words: str, slow: bool = False) -> Answer:
        """Run a program with the context's variables, for ``timeout_s`` at most, or three times as long."""
        fds = []
        # PMI2 gives a process a connection to the launcher, not an address.
        number = self.environ.get("PMI_FD", "")
        if number.isdigit():
            with contextlib.suppress(OSError):
                os.fstat(int(number))
                fds.append(int(number))
        timeout_s = self.timeout_s * (SLOW if slow else 1)
        return run_command(words, timeout_s=timeout_s, environ=self.environ, pass_fds=fds)

    def probe(self, what: str, argument: str, *, slow: bool = False) -> tuple[dict[str, Any], Answer]:
        """Run :file:`probe.py`: what it found as far as it got, and how it ended."""
        answer = self.run(sys.executable, "-P", str(_PROBE), what, argument, slow=slow)
        report: dict[str, Any] = {}
        for line in answer.stdout.splitlines():
            # Libraries write to standard output, too.
            with contextlib.suppress(ValueError):
                report.update(json.loads(line) if line.startswith("{") else {})
        return report, answer
