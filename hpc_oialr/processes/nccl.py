"""Settings of NCCL's watchdog: a process that waits for a lost one ends after the timeout."""

from __future__ import annotations

from collections.abc import MutableMapping

# 3: after a failed or late collective the watchdog ends the process and leaves the communicators as they
# are; taking them down first needs the dead peer now and then, and has held whole jobs for hours.
_LEAVE_HARD = "3"
_LEAST_HEARTBEAT_S = 60


def configure_nccl_watchdog(environ: MutableMapping[str, str], timeout_s: float) -> None:
    """Set what torch's NCCL watchdog reads when a group is made; settings of the user are kept.

    A collective that takes longer than the group's timeout ends the process by
    ``TORCH_NCCL_ASYNC_ERROR_HANDLING``. Should the watchdog itself hang inside CUDA, a monitor ends the
    process once there has been no heartbeat for ``TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC``, the timeout again, at
    least a minute. Nothing is dumped first, since that waits for the other processes.

    Parameters
    ----------
    environ
        Changed in place; ``os.environ`` in a run.
    timeout_s
        The group's timeout (s).

    References
    ----------
    PyTorch documentation, "PYTORCH ProcessGroupNCCL Environment Variables".
    """
    environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", _LEAVE_HARD)
    environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "1")
    environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(max(_LEAST_HEARTBEAT_S, round(timeout_s))))
    environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
