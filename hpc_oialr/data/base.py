"""The interface of data sets: whole batches by index, and a config that builds them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hpc_oialr.data.counter_rng import CounterRNG
from hpc_oialr.errors import ConfigError

Batch = dict[str, Tensor]


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
        """Load, check and split the data, and cut the training part to ``limit``.

        Raises
        ------
        DataError
            A file is missing, damaged or has another format; the message says how to get it.
        """
        splits = self._load()
        return splits if self.limit is None else replace(splits, train=splits.train.take(self.limit))

    @abstractmethod
    def _load(self) -> Splits: ...


def check_fractions(validation: float, test: float) -> None:
    """Raise :class:`ConfigError` unless both fractions lie in [0, 1) and leave something to train on."""
    for name, value in (("validation_fraction", validation), ("test_fraction", test)):
        if not 0 <= value < 1:
            raise ConfigError(f"data.{name}", value, "must lie in [0, 1)")
    if validation + test >= 1:
        names = "data.validation_fraction + data.test_fraction"
        raise ConfigError(names, validation + test, "must leave a part to train on, i.e. lie below 1")
