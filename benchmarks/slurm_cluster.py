"""A real Slurm for tests and benchmarks, and runs in its jobs that can be watched, paused and struck."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from hpc_oialr.record import read_metrics

HERE = Path(__file__).parents[1]
SCRIPT = HERE / "env" / "local_slurm.sh"
PATIENCE_S = 240.0
PORTS = 16


def why_not() -> str | None:
    """Why there can be no cluster here."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed; as root: env/local_slurm.sh install"
    return None if os.geteuid() == 0 else "only root can be all nodes of a cluster"


def until(condition: Callable[[], object], what: str, within_s: float = PATIENCE_S) -> None:
    """Wait, but not for ever."""
    give_up = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < give_up, f"waited in vain for {what}"
        time.sleep(0.02)


class Cluster:
    """Four nodes on this host, stopped at the end of the ``with`` statement.

    Parameters
    ----------
    settings
        Of local_slurm.sh, e.g. ``LOCAL_SLURM_ACCOUNTING="1"``.
    """

    def __init__(self, **settings: str) -> None:
        # Sockets must have short paths.
        self.root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(HERE),
            "OMP_NUM_THREADS": "1",
            "LOCAL_SLURM_ROOT": str(self.root / "cluster"),
            "LOCAL_SLURM_PORT": str(_free_ports()),
            **settings,
            "SLURM_CONF": str(self.root / "cluster" / "slurm.conf"),
        }

    def __enter__(self) -> Cluster:
        self.call(str(SCRIPT), "start")
        return self

    def __exit__(self, *_: object) -> None:
        self.call(str(SCRIPT), "stop")
        shutil.rmtree(self.root)

    def call(self, *words: str, **extra: str) -> str:
        """Run a program to its end; what it says."""
        done = subprocess.run(
            words,
            env=self.environment | extra,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout.strip()

    def sbatch(self, *words: str, **extra: str) -> Job:
        """Submit a script with its settings; the job works in ``root``."""
        return Job(self, self.call("sbatch", "--parsable", *words, **extra))

    def oialr(self, *words: str) -> str:
        """A command of ours; what it says."""
        return self.call(sys.executable, "-m", "hpc_oialr", *words)

    def submit(self, recipe: str, *words: str) -> Job:
        """``oialr submit`` with its options and settings."""
        said = self.oialr("submit", recipe, *words)
        return Job(self, said.removeprefix("job ").partition(":")[0])


class Job:
    """One job, and the run in it."""

    def __init__(self, cluster: Cluster, number: str) -> None:
        self.cluster, self.number = cluster, number

    def fields(self) -> dict[str, str]:
        """What Slurm says of it."""
        said = self.cluster.call("scontrol", "--oneliner", "show", "job", self.number)
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    @property
    def state(self) -> str:
        """E.g. "RUNNING"."""
        return self.fields()["JobState"]

    @property
    def output(self) -> str:
        """What its script and its run have written."""
        path = Path(self.fields()["StdOut"])
        return path.read_text() if path.exists() else ""

    def wait(self) -> Job:
        """Until it is over; an error if it failed."""
        until(lambda: self.state in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED"), f"the end of {self.number}")
        assert self.state == "COMPLETED", self.output
        return self

    def start_again(self) -> None:
        """Once it is in the queue again, spare it the two minutes that Slurm lets it wait."""
        until(lambda: self.state == "PENDING", "a requeue")
        # In the second in which it was ended nodes would refuse it: its credential is revoked.
        self.cluster.call("scontrol", "update", f"jobid={self.number}", "starttime=now+2", "timelimit=60")

    def tasks(self) -> list[int]:
        """Process ids of its tasks, in order of rank."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                variables = dict(line.partition("=")[::2] for line in path.read_text(errors="replace").split("\0"))
                words = (path.parent / "cmdline").read_text().split("\0")
            except OSError:
                continue
            mine = variables.get("SLURM_JOB_ID") == self.number and "SLURM_PROCID" in variables
            ours = any(word in ("hpc_oialr", "hpc_oialr.launch.task") for word in words)
            if mine and ours and "SLURM_STEP_ID" in variables:
                found[int(variables["SLURM_PROCID"])] = int(path.parent.name)
        return [found[rank] for rank in sorted(found)]

    def pause_at(self, step: int, metrics: Path, stack: ExitStack) -> list[int]:
        """Stop the tasks' clocks once the run is past a step; their process ids. ``stack`` lets them go on."""
        until(lambda: last_step(metrics) >= step, f"step {step}: {self.output}")
        tasks = self.tasks()
        for task in tasks:
            os.kill(task, signal.SIGSTOP)
            stack.callback(_send, task, signal.SIGCONT)
        return tasks


def last_step(metrics: Path) -> int:
    """Steps that a run has written down."""
    return max((row["step"] for row in read_metrics(metrics)), default=0) if metrics.exists() else 0


def is_paused(task: int) -> bool:
    """Whether a process stands still; Slurm lets it go on before it sends it a signal."""
    try:
        return Path(f"/proc/{task}/stat").read_text().rpartition(") ")[2].startswith("T")
    except FileNotFoundError:
        return False


def awaits(task: int, number: signal.Signals) -> bool:
    """Whether a process that stands still will get a signal when it goes on."""
    lines = Path(f"/proc/{task}/status").read_text().splitlines()
    pending = next(line for line in lines if line.startswith("ShdPnd:")).split()[1]
    return bool(int(pending, 16) >> (number - 1) & 1)


def _send(task: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(task, number)


def _free_ports() -> int:
    """The first of some ports in a row that nobody uses."""
    while True:
        first = random.randrange(12_000, 19_000)
        with ExitStack() as stack:
            try:
                for port in range(first, first + PORTS):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        return first


def scripts() -> Sequence[Path]:
    """The batch scripts of the repository."""
    return sorted(path for path in (HERE / "slurm").glob("*.sh") if path.stem != "common")
