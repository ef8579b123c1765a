"""One :class:`World` from torchrun, srun, mpirun or a single process; checks of replicas; metric reduction."""

from typing import TYPE_CHECKING

from hpc_oialr.lazy import offer

if TYPE_CHECKING:
    from hpc_oialr.distributed.environment import LaunchInfo, launch_info
    from hpc_oialr.distributed.metric_reduction import MetricsChannel, open_channel
    from hpc_oialr.distributed.replicas import check_equal
    from hpc_oialr.distributed.world import World

__all__ = ["LaunchInfo", "MetricsChannel", "World", "check_equal", "launch_info", "open_channel"]

offer(__name__)
