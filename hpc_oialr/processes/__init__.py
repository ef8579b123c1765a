"""Processes: one :class:`World` from torchrun, srun, mpirun or a single process; equal replicas; metrics."""

from hpc_oialr.processes.environment import LaunchInfo, launch_info
from hpc_oialr.processes.metrics_channel import MetricsChannel
from hpc_oialr.processes.open_channel import open_channel
from hpc_oialr.processes.replicas import check_equal
from hpc_oialr.processes.world import World

__all__ = ["LaunchInfo", "MetricsChannel", "World", "check_equal", "launch_info", "open_channel"]
