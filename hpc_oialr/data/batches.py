"""Global batches: the same for any number of ranks, and after a resume."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hpc_oialr.data.base import ArrayDataset, Batch, CounterRNG
from hpc_oialr.errors import ConfigError, SampleError


@dataclass(eq=False)
class GlobalBatches:
    """Distributes a data set over ranks in global batches.

    The order of an epoch is a pure function of (seed, epoch). Rank p of P gets slice p of every global batch; the
    slices joined in the order of ranks are the global batch, for any P.

    In training an epoch has a new order, augmentation, and no samples at the end that fill no global batch. Otherwise
    all samples come in the order of the data set; the last batch is sliced as evenly as possible, and a rank may have
    one batch fewer than another.
    """

    dataset: ArrayDataset
    global_batch: int  # samples of a step over all ranks
    _: KW_ONLY
    world_rank: int = 0
    world_size: int = 1
    seed: int  # of the order and of the augmentation
    training: bool
    num_workers: int = 0  # processes that prepare batches; 0 is best for arrays in memory
    pin_memory: bool = False  # for copies to a GPU

    def __post_init__(self) -> None:
        check_shares(self.global_batch, self.world_size)
        n = len(self.dataset)
        if n == 0 or (self.training and self.global_batch > n):
            rule = f"must not exceed the {n} samples of the data set"
            raise ConfigError("global_batch", self.global_batch, rule)

    def __len__(self) -> int:
        """Global batches in an epoch."""
        full, tail = divmod(len(self.dataset), self.global_batch)
        return full if self.training or not tail else full + 1

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's slices of an epoch's global batches, from step ``start`` on; torch's generator is not used."""
        n, rng = len(self.dataset), CounterRNG(self.seed, epoch)
        order = rng.permutation(n) if self.training else torch.arange(n)
        drawn = rng if self.training else None
        if self.dataset.device.type != "cpu":
            # One copy an epoch, and neither workers nor pinned memory.
            for part in self._slices(order.to(self.dataset.device), start):
                yield self.dataset.gather(part, drawn)
            return
        loader = DataLoader(
            _SliceDataset(self.dataset, drawn),
            batch_size=None,
            sampler=(part.tolist() for part in self._slices(order, start)),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),
        )
        for batch in loader:
            if isinstance(batch, SampleError):
                raise batch
            yield batch

    def _slices(self, order: Tensor, start: int) -> Iterator[Tensor]:
        p, size = self.world_rank, self.world_size
        for step in range(start, len(self)):
            whole = order[step * self.global_batch : (step + 1) * self.global_batch]
            part = whole[p * len(whole) // size : (p + 1) * len(whole) // size]
            if len(part):
                yield part


def check_shares(global_batch: int, size: int) -> None:
    """Raise :class:`ConfigError` unless a global batch can be distributed evenly over ``size`` ranks."""
    if global_batch < 1 or global_batch % size:
        rule = f"must be a positive multiple of the world size, which is {size}"
        fix = f"Nearest that fits: {max(1, round(global_batch / size)) * size}."
        raise ConfigError("global_batch", global_batch, rule, fix=fix)


class _SliceDataset(Dataset[Batch | SampleError]):
    """Indexed by a whole slice, so that the DataLoader need not collate."""

    def __init__(self, dataset: ArrayDataset, rng: CounterRNG | None) -> None:
        self.dataset, self.rng = dataset, rng

    def __getitem__(self, indices: Any) -> Batch | SampleError:
        try:
            return self.dataset.gather(torch.tensor(indices, dtype=torch.int64), self.rng)
        except SampleError as error:
            # Raised in a worker process, its message would become a traceback.
            return error


def _ignore_signals(worker: int) -> None:
    """A job's warning signals and Ctrl-C reach every process; only the trainer handles them."""
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
