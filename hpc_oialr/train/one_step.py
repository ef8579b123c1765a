"""The first half of a training step: loss and gradients. ``Engine.update`` is the second."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from hpc_oialr.data import Batch
from hpc_oialr.train.session import Session
from hpc_oialr.train.tasks import Moment


def forward_backward(session: Session, batch: Batch, step: int) -> Tensor:
    """Gradients of the mean loss over the global batch; this process's mean loss, on the device.

    Parameters
    ----------
    batch
        This process's part, on the device.
    step
        Steps done.
    """
    controller, train = session.controller, session.config.train
    losses = []
    for part, piece in enumerate(pieces(batch, train.accumulation)):
        last = part == train.accumulation - 1
        with nullcontext() if last else controller.no_sync():
            with session.autocast():
                moment = Moment(train.seed, step, part)
                loss = session.config.task.loss(controller.model, piece, moment) / train.accumulation
            session.engine.backward(loss, session.scaler)
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def pieces(batch: Batch, count: int) -> list[Batch]:
    """Equal parts of a batch."""
    if count == 1:
        return [batch]
    parts = {key: value.chunk(count) for key, value in batch.items()}
    return [{key: values[i] for key, values in parts.items()} for i in range(count)]
