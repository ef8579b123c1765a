"""What a batch script holds besides its header: requeue, threads, site, and how processes are started."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from hpc_oialr.errors import UnknownNameError
from hpc_oialr.launch.request import Request

# A process that dies ends the others at once; without an order of its own srun would empty the log files of the
# time before a requeue.
SRUN_ARGUMENTS = ("--kill-on-bad-exit=1", "--wait=60", "--open-mode=append")
_SITES = Path(__file__).resolve().parents[2] / "env" / "sites"


def setup_lines(request: Request) -> list[str]:
    """Shell lines before srun."""
    requeue = f'{python("hpc_oialr.launch.requeue")} "$?"'
    lines = [
        f"export OIALR_MAX_REQUEUES={request.max_requeues}",
        # First, so that a site file that fails is seen by it too.
        f"trap {shlex.quote(requeue)} EXIT",
        # At the end of its job bash would leave at once, with code 0: let it wait for srun's.
        "trap : TERM",
        "set -eo pipefail",
        # Since 22.05 srun does not inherit --cpus-per-task.
        '[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"',
    ]
    if request.site is not None:
        lines.append(f"source {shlex.quote(str(site_file(request.site)))}")
    return [*lines, *request.setup]


def python(module: str, *arguments: str) -> str:
    """Shell words that run a module by the present interpreter."""
    return shlex.join([sys.executable, "-u", "-m", module, *arguments])


def site_file(site: str) -> Path:
    """The site file of a name, or of a path.

    Raises
    ------
    UnknownNameError
        Listing the names there are.
    """
    given = Path(site)
    if given.suffix == ".sh" and given.is_file():
        return given.resolve()
    named = _SITES / f"{site}.sh"
    if named.is_file():
        return named
    raise UnknownNameError("site", site, (path.stem for path in _SITES.glob("*.sh")))
