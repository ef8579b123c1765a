"""The interface of data sets: batches by index, a config that builds them, and their random numbers.

Random numbers are a pure function of (seed, epoch, sample): there is no state to save or to synchronise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hpc_oialr.errors import ConfigError, check_interval
from hpc_oialr.linalg.splitmix import INCREMENT, mix, shift_right, signed

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class CounterRNG:
    """The random numbers of one epoch of a run, independent of the machine, the world size and torch's generators."""

    seed: int
    epoch: int = 0

    def bits(self, samples: Tensor, stream: int) -> Tensor:
        """64 random bits, as int64, for each of ``samples`` (int64, any shape); streams are independent."""
        key = 0
        for part in (self.seed, self.epoch, stream):
            key = signed(mix(key + INCREMENT * (part + 1)))
        return mix(samples * INCREMENT + key)

    def integers(self, samples: Tensor, high: int, *, stream: int) -> Tensor:
        """One integer in [0, high) for each sample; the bias of the remainder is below high / 2^64."""
        unsigned = self.bits(samples, stream).numpy().view(np.uint64)
        return torch.from_numpy((unsigned % np.uint64(high)).astype(np.int64))

    def uniform(self, samples: Tensor, *, stream: int) -> Tensor:
        """One float64 in [0, 1) for each sample, a multiple of 2^-53."""
        return shift_right(self.bits(samples, stream), 11).double() * 2.0**-53

    def permutation(self, n: int) -> Tensor:
        """A random order of ``range(n)``, int64 [n]."""
        # With the first bit flipped, signed numbers have the order of the unsigned ones.
        keys = self.bits(torch.arange(n), stream=0) ^ signed(1 << 63)
        return keys.argsort(stable=True)


def fixed_order(n: int) -> Tensor:
    """A random order of ``range(n)``, the same for every seed: for the parts of a data set."""
    return CounterRNG(seed=0).permutation(n)


class ArrayDataset(ABC):
    """Samples that are gathered a batch at a time, so that no collation is needed."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def gather(self, indices: Tensor, rng: CounterRNG | None = None) -> Batch:
        """Stack the samples at ``indices`` (int64 [B]); ``rng`` draws the augmentation, None for none."""

    def subset(self, indices: Tensor) -> ArrayDataset:
        """A view of the samples at ``indices``, int64 [n]; nothing is copied."""
        return SubsetView(self, indices)

    def take(self, n: int) -> ArrayDataset:
        """A view of the first ``n`` samples (of all, if there are fewer)."""
        return self.subset(torch.arange(min(n, len(self))))


class SubsetView(ArrayDataset):
    """Some samples of another data set; augmentation still sees their positions in the whole one."""

    def __init__(self, whole: ArrayDataset, indices: Tensor) -> None:
        self.whole, self.indices = whole, indices

    def __len__(self) -> int:
        return len(self.indices)

    def gather(self, indices: Tensor, rng: CounterRNG | None = None) -> Batch:
        """Stack the samples at ``indices`` of the view."""
        return self.whole.gather(self.indices[indices], rng)

    def subset(self, indices: Tensor) -> ArrayDataset:
        """A view of this view, one level deep."""
        return SubsetView(self.whole, self.indices[indices])


@dataclass(frozen=True)
class Splits:
    """Parts of a data set; a part that was not asked for is None."""

    train: ArrayDataset
    validation: ArrayDataset | None
    test: ArrayDataset | None
    classes: int | None = None  # labels or tokens; None where there are none


class DataConfig(ABC):
    """A data set to choose in a recipe; each kind is a keyword-only dataclass.

    Attributes
    ----------
    limit
        Use only the first so many training samples, for smoke runs; None for all.
    """

    limit: int | None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            fix = "Leave it out for all samples."
            raise ConfigError("data.limit", self.limit, "must be at least 1", fix=fix)

    def build(self) -> Splits:
        """Load, check and split the data, and cut the training part to ``limit``; DataError if a file is damaged."""
        splits = self._load()
        return splits if self.limit is None else replace(splits, train=splits.train.take(self.limit))

    @abstractmethod
    def _load(self) -> Splits: ...


def check_fractions(validation: float, test: float) -> None:
    """Raise :class:`ConfigError` unless both fractions lie in [0, 1) and leave something to train on."""
    for name, value in (("validation_fraction", validation), ("test_fraction", test)):
        check_interval(f"data.{name}", value, 0, 1, closed=(True, False))
    if validation + test >= 1:
        names = "data.validation_fraction + data.test_fraction"
        raise ConfigError(names, validation + test, "must leave a part to train on, i.e. lie below 1")
