"""Variables of a process that srun started."""

from __future__ import annotations


def step(rank: int = 0, tasks: int = 4, *, per_node: str = "", **more: str) -> dict[str, str]:
    """Process ``rank`` of ``tasks`` on the first node; all tasks are there unless ``per_node`` says otherwise."""
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": str(tasks),
        "SLURM_TASKS_PER_NODE": per_node or str(tasks),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        **more,
    }
