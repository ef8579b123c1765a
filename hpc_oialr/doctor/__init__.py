"""Is this machine fit for a run: faults of Slurm, MPI, GPUs, files, threads and network, each with its fix."""

from hpc_oialr.doctor.examination import examine
from hpc_oialr.doctor.finding import Finding
from hpc_oialr.doctor.patient import Patient

__all__ = ["Finding", "Patient", "examine"]
