"""What a site file says: options of sbatch, and variables as they are once it has been sourced."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from hpc_oialr.doctor.finding import Finding, ok, problem
from hpc_oialr.launch.site import site_file
from hpc_oialr.processes.environment import all_variables

_TIMEOUT_S = 60
# Arrays and what is not exported reach another program as variables only.
_SCRIPT = """
set -eo pipefail
SITE_SBATCH=() SITE_SRUN=() SITE_MPI=
source "$1" >/dev/null
export SITE_OPTIONS="${SITE_SBATCH[*]}" SITE_MPI
[ -z "${OIALR_RUNS:-}" ] || export OIALR_RUNS
env -0
"""
_PARTITION = re.compile(r"(?:^|\s)(?:--partition[=\s]|-p)\s*(\S+)")
_ACCOUNT = re.compile(r"(?:^|\s)(?:--account[=\s]|-A)\s*(\S+)")


@dataclass(frozen=True)
class Surroundings:
    """Variables, and what they and the site ask of Slurm.

    Attributes
    ----------
    environ
        All variables.
    findings
        Whether the site file runs here; nothing without one.
    """

    environ: Mapping[str, str]
    findings: tuple[Finding, ...] = ()

    @property
    def partition(self) -> str | None:
        """Of the site's options, which go before Slurm's own variable."""
        return self._option(_PARTITION) or self.environ.get("SBATCH_PARTITION")

    @property
    def account(self) -> str | None:
        """The same."""
        return self._option(_ACCOUNT) or self.environ.get("SBATCH_ACCOUNT")

    @property
    def runs(self) -> str:
        """Where batch scripts put run folders."""
        return self.environ.get("OIALR_RUNS", "runs")

    def _option(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.findall(self.environ.get("SITE_OPTIONS", ""))
        return found[-1] if found else None


def surroundings(site: str | None) -> Surroundings:
    """This process's variables, or what batch scripts make of them by sourcing a site file.

    Raises
    ------
    UnknownNameError
        If there is no such site; lists those there are.
    """
    if site is None:
        return Surroundings(all_variables())
    command = ["bash", "-c", _SCRIPT, "site", str(site_file(site))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        return _without(site, str(error))
    if done.returncode:
        return _without(site, done.stderr.strip() or f"exit code {done.returncode}")
    pairs = (text.partition("=") for text in done.stdout.split("\0") if "=" in text)
    environ = {name: value for name, _, value in pairs}
    return Surroundings(environ, (ok("site", f"{site}: its file runs here"),))


def _without(site: str, reason: str) -> Surroundings:
    found = f"the file of {site} does not run here: {reason.splitlines()[-1]}"
    fix = f"module avail   (then correct {site_file(site)})"
    return Surroundings(all_variables(), (problem("site", found, fix),))
