"""Variables as a site file leaves them: modules loaded, interfaces named."""

from __future__ import annotations

import subprocess

from hpc_oialr.doctor.finding import Finding, ok, problem
from hpc_oialr.launch.script import site_file
from hpc_oialr.processes.environment import all_variables

_TIMEOUT_S = 60
_SCRIPT = 'set -eo pipefail; source "$1" >/dev/null; env -0'


def environment_of(site: str | None) -> tuple[dict[str, str], list[Finding]]:
    """This process's variables, or what they are once a site file has been sourced, as batch scripts do.

    Returns
    -------
    tuple
        The variables, and whether the file runs here.

    Raises
    ------
    UnknownNameError
        If there is no such site; lists those there are.
    """
    if site is None:
        return all_variables(), []
    command = ["bash", "-c", _SCRIPT, "site", str(site_file(site))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        return all_variables(), [_failed(site, str(error))]
    if done.returncode:
        return all_variables(), [_failed(site, done.stderr.strip() or f"exit code {done.returncode}")]
    pairs = (text.partition("=") for text in done.stdout.split("\0") if "=" in text)
    return {name: value for name, _, value in pairs}, [ok("site", f"{site}: its file runs here")]


def _failed(site: str, reason: str) -> Finding:
    found = f"the file of {site} does not run here: {reason.splitlines()[-1]}"
    return problem("site", found, f"module avail   (then correct {site_file(site)})")
