"""From the login node to the running job: submitting runs, their lives, and what becomes of them."""

from typing import TYPE_CHECKING

from hpc_oialr.lazy import offer

if TYPE_CHECKING:
    from hpc_oialr.launch.request import Request
    from hpc_oialr.launch.submission import submit

__all__ = ["Request", "submit"]

offer(__name__)
