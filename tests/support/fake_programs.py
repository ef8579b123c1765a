"""Small shell scripts in a folder of their own: programs that answer as they are told, fail, or hang."""

from __future__ import annotations

import shlex
from pathlib import Path

# What a healthy cluster of Slurm 22.05 answers.
HEALTHY = {
    "sinfo": "main*|up|1/3/0/4\nurgent|up|0/4/0/4",
    "sbatch": "",
    "srun": "MPI plugin types are...\n\tnone\n\tpmi2\n\tpmix\nspecific pmix plugin versions available: pmix_v4",
    "squeue": "RUNNING",
    "scontrol": "Slurmctld(primary) at head is UP",
    "scancel": "",
    "munge": "",
}


class Programs:
    """A folder that stands for the whole of PATH.

    Parameters
    ----------
    folder
        Where to put the scripts; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, out: str = "", *, err: str = "", code: int = 0) -> None:
        """A program that says something."""
        lines = [
            f"printf '%s\\n' {shlex.quote(out)}" if out else "",
            f"printf '%s\\n' {shlex.quote(err)} >&2",
        ]
        self._write(name, [*lines, f"exit {code}"])

    def hang(self, name: str, out: str = "") -> None:
        """A program that says something, then waits for one of its own, which holds its output open."""
        said = f"printf '%s\\n' {shlex.quote(out)}"
        self._write(name, [f"echo $$ > {self.path}/{name}.pid", said, "/bin/sleep 600", "exit 0"])

    def put_cluster(self) -> None:
        """All of a healthy cluster's."""
        for name, out in HEALTHY.items():
            self.put(name, out)

    def remove(self, *names: str) -> None:
        """Take programs away."""
        for name in names:
            (self.path / name).unlink()

    def _write(self, name: str, lines: list[str]) -> None:
        program = self.path / name
        program.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
        program.chmod(0o755)
