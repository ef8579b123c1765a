"""Turn communication failures into ProcessLostError; under NCCL let the watchdog end a process that waits."""

from __future__ import annotations

import re
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

import torch.distributed as dist

from hpc_oialr.errors import OIALRError, ProcessLostError

# Gloo raises plain RuntimeErrors; its own sources stand in their text.
_COMMUNICATION = re.compile(
    r"gloo/|pair closure|ProcessGroup|NCCL|TCPStore|c10d|MPI_|[Cc]onnection (closed|reset)"
)
# 3: after a failed or late collective the watchdog ends the process and leaves the communicators as they
# are; taking them down first needs the dead peer now and then, and has held whole jobs for hours.
_LEAVE_HARD = "3"
_LEAST_HEARTBEAT_S = 60


@contextmanager
def reported(what: str, rank: int, size: int, *, only_communication: bool = False) -> Iterator[None]:
    """Turn a failed communication inside into a :class:`ProcessLostError` that says what to do.

    ``what`` was under way, e.g. "an all-reduce". ``only_communication``: let RuntimeErrors through whose text is not
    that of a communication library, for code that also computes.
    """
    try:
        yield
    except OIALRError:
        raise
    except RuntimeError as error:
        # Gloo, NCCL or MPI raised it.
        of_library = isinstance(error, dist.DistError) or _COMMUNICATION.search(str(error)) is not None
        if only_communication and not of_library:
            raise
        raise lost(what, rank, size, str(error)) from error


def lost(what: str, rank: int, size: int, reason: str) -> ProcessLostError:
    """The error itself; ``reason`` is what the library below said."""
    return ProcessLostError(
        f"rank {rank} of {size}: {what} failed; every rank must take part within the timeout "
        f"(train.timeout_s). Another one has died or hangs: see its log, then resume from the last checkpoint. "
        f"({reason})"
    )


def configure_nccl_watchdog(environ: MutableMapping[str, str], timeout_s: float) -> None:
    """Set what torch's NCCL watchdog reads when a group is made; settings of the user are kept.

    A collective that takes longer than the group's timeout ends the process by
    ``TORCH_NCCL_ASYNC_ERROR_HANDLING``. Should the watchdog itself hang inside CUDA, a monitor ends the
    process once there has been no heartbeat for ``TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC``, the timeout again, at
    least a minute. Nothing is dumped first, since that waits for the other processes. See the PyTorch
    documentation, "PYTORCH ProcessGroupNCCL Environment Variables".
    """
    environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", _LEAVE_HARD)
    environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "1")
    environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(max(_LEAST_HEARTBEAT_S, round(timeout_s))))
    environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
