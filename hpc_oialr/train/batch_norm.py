"""Batch statistics over all processes."""

from __future__ import annotations

import logging

from torch import nn

from hpc_oialr.method.engine import Peers

log = logging.getLogger(__name__)


def synchronise_batch_norm(module: nn.Module, world: Peers) -> None:
    """Let every batch norm below ``module`` take its statistics from the batches of all processes, in place.

    Only on GPUs: torch's ``SyncBatchNorm`` has no other kernels. Elsewhere each process keeps to its own
    batch, and a warning says so. Sends 2 C + 1 numbers a layer of C channels forward, 2 C backward.
    """
    if world.size == 1:
        return
    if world.device.type != "cuda":
        log.warning(
            "train.sync_batch_norm is true, but torch can do that on GPUs only: each of the %d processes takes "
            "batch statistics from its own part of the batch.",
            world.size,
        )
        return
    nn.SyncBatchNorm.convert_sync_batchnorm(module, world.group)
