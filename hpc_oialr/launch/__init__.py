"""Submit runs to Slurm, follow and cancel their jobs, and start or resume a run inside a job."""

from typing import TYPE_CHECKING

from hpc_oialr.lazy import offer

if TYPE_CHECKING:
    from hpc_oialr.launch.request import Request
    from hpc_oialr.launch.submission import submit

__all__ = ["Request", "submit"]

offer(__name__)
