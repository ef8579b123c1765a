"""What a batch script holds besides its header: what every job does, the site, and how processes are started."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from hpc_oialr.launch.request import Request
from hpc_oialr.launch.site import ClusterConfig

# Without an order of its own srun would empty the log files of the time before a requeue.
SRUN_ARGUMENTS = ("--open-mode=append",)
_JOB = Path(__file__).with_name("job.sh")


def setup_lines(request: Request, site: ClusterConfig) -> list[str]:
    """Shell lines before srun; see :file:`job.sh`, which comes first so that it sees a site file that fails too."""
    sources = [_JOB] if site.file is None else [_JOB, site.file]
    return [
        f"export OIALR_MAX_REQUEUES={request.max_requeues}",
        "set -eo pipefail",
        *(f"source {shlex.quote(str(file))}" for file in sources),
        *request.setup,
    ]


def python(module: str, *arguments: str) -> str:
    """Shell words that run a module by the present interpreter."""
    return shlex.join([sys.executable, "-u", "-m", module, *arguments])
