"""What a batch script holds besides its header: requeue, threads, site, and how processes are started."""

from __future__ import annotations

import shlex
import sys

from hpc_oialr.launch.request import Request
from hpc_oialr.launch.site import Site

# A process that dies ends the others at once; without an order of its own srun would empty the log files of the
# time before a requeue.
SRUN_ARGUMENTS = ("--kill-on-bad-exit=1", "--wait=60", "--open-mode=append")

_VARIABLES = (
    # HDF5 locks files in a way that parallel file systems do not have.
    "export HDF5_USE_FILE_LOCKING=${HDF5_USE_FILE_LOCKING:-FALSE}",
    "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}",
)


def setup_lines(request: Request, site: Site) -> list[str]:
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
    if site.file is not None:
        lines.append(f"source {shlex.quote(str(site.file))}")
    return [*lines, *_VARIABLES, *request.setup]


def python(module: str, *arguments: str) -> str:
    """Shell words that run a module by the present interpreter."""
    return shlex.join([sys.executable, "-u", "-m", module, *arguments])
