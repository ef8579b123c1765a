"""A model's metrics over a data set that is dealt to all processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch

from hpc_oialr.data import ArrayDataset, Batch, GlobalBatches
from hpc_oialr.train.run_context import RunContext
from hpc_oialr.train.snapshot import share_buffers


@torch.no_grad()
def evaluate(context: RunContext, dataset: ArrayDataset) -> dict[str, float]:
    """Loss and metrics of the model over ``dataset``, equal on all processes; a collective call.

    Leaves no trace in the run: no random numbers are drawn, and compiled code is not compiled anew.
    """
    share_buffers(context)
    module, engine, task = context.module, context.engine, context.config.task
    batches = GlobalBatches(
        dataset,
        context.config.train.evaluation_batch * engine.data.size,
        world_rank=engine.data.rank,
        world_size=engine.data.size,
        seed=context.config.train.seed,
        shuffle=False,
        drop_last=False,
        num_workers=context.config.train.workers,
    )
    parts = []
    module.eval()
    with torch.compiler.set_stance("force_eager") if context.config.compile else nullcontext():
        for batch, counts in _in_step(batches, dataset):
            with context.autocast():
                part = task.totals(module, context.place(batch))
            parts.append(part if counts else torch.zeros_like(part))
    module.train()
    shared = engine.data.all_gather_object(torch.stack(parts).sum(0).tolist())
    return task.metrics(torch.tensor(shared, dtype=torch.float64).sum(0))


def _in_step(batches: GlobalBatches, dataset: ArrayDataset) -> Iterator[tuple[Batch, bool]]:
    """This process's batches, and whether they count: all processes get as many.

    Some engines gather parameters in every forward pass, which all processes must take part in; one that
    has no share of the last batch goes along with a sample that does not count.
    """
    given = 0
    for batch in batches.epoch(0):
        given += 1
        yield batch, True
    for _ in range(given, len(batches)):
        yield dataset.gather(torch.arange(1)), False
