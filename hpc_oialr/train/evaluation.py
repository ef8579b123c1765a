"""A model's metrics over a data set that is dealt to all processes."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from hpc_oialr.data import ArrayDataset, GlobalBatches
from hpc_oialr.train.session import Session
from hpc_oialr.train.snapshot import share_buffers


@torch.no_grad()
def evaluate(session: Session, dataset: ArrayDataset) -> dict[str, float]:
    """Loss and metrics of the model over ``dataset``, equal on all processes; a collective call.

    Leaves no trace in the run: no random numbers are drawn, and compiled code is not compiled anew.
    """
    share_buffers(session)
    module, world, task = session.module, session.world, session.config.task
    batches = GlobalBatches(
        dataset,
        session.config.train.evaluation_batch * world.size,
        world_rank=world.rank,
        world_size=world.size,
        seed=session.config.train.seed,
        shuffle=False,
        drop_last=False,
    )
    totals: torch.Tensor | None = None
    module.eval()
    with torch.compiler.set_stance("force_eager") if session.config.compile else nullcontext():
        for batch in batches.epoch(0):
            with session.autocast():
                part = task.totals(module, session.place(batch))
            totals = part if totals is None else totals + part
    module.train()
    shared = world.all_gather_object(None if totals is None else totals.tolist())
    parts = [torch.tensor(part, dtype=torch.float64) for part in shared if part is not None]
    return task.metrics(torch.stack(parts).sum(0))
