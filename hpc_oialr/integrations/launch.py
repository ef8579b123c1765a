"""Whether a library uses all processes that were started."""

from __future__ import annotations

from hpc_oialr.distributed.environment import launch_info
from hpc_oialr.errors import ModelError, WorldError


def require_all_processes(used: int, library: str, fix: str) -> None:
    """Raise :class:`ModelError` if torchrun, srun or mpirun started more processes than a library's run has.

    Each would train alone, and all of them would write into the same folder.
    """
    try:
        launch = launch_info()
    except WorldError:  # the library starts its own processes, with variables of its own
        return
    if launch.size > used:
        raise ModelError(
            f"{launch.launcher} started {launch.size} processes, but {library} has {used} in this run: each would train "
            f"alone and write over the files of the others. {fix}, or start one process."
        )
