"""Checks of Slurm, MPI, GPUs, files, threads and network before a run; each problem comes with its fix."""

from hpc_oialr.doctor.checks import run_checks
from hpc_oialr.doctor.context import CheckContext, Finding

__all__ = ["CheckContext", "Finding", "run_checks"]
