"""Processes: one :class:`World` from torchrun, srun, mpirun or a single process, and equal replicas."""

from hpc_oialr.processes.environment import LaunchInfo, launch_info
from hpc_oialr.processes.replicas import check_equal
from hpc_oialr.processes.world import World

__all__ = ["LaunchInfo", "World", "check_equal", "launch_info"]
