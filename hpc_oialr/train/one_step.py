"""The first half of a training step: loss and gradients. ``Engine.update`` is the second."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from hpc_oialr.data import Batch
from hpc_oialr.train.run_context import RunContext
from hpc_oialr.train.tasks import StepRNG


def forward_backward(context: RunContext, batch: Batch, step: int) -> Tensor:
    """Gradients of the mean loss over the global batch; this process's mean loss, on the device.

    Parameters
    ----------
    batch
        This process's part, on the device.
    step
        Steps done.
    """
    controller, train = context.controller, context.config.train
    losses = []
    for part, piece in enumerate(pieces(batch, train.accumulation)):
        last = part == train.accumulation - 1
        with nullcontext() if last else controller.no_sync():
            with context.autocast():
                rng = StepRNG(train.seed, step, part)
                loss = context.config.task.loss(controller.model, piece, rng) / train.accumulation
            context.engine.backward(loss, context.scaler)
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def pieces(batch: Batch, count: int) -> list[Batch]:
    """Equal parts of a batch."""
    if count == 1:
        return [batch]
    parts = {key: value.chunk(count) for key, value in batch.items()}
    return [{key: values[i] for key, values in parts.items()} for i in range(count)]
