"""What a data set is to the rest: something that hands out whole batches, and a config that builds it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hpc_oialr.data.counter_rng import CounterRNG
from hpc_oialr.errors import ConfigError

Batch = dict[str, Tensor]


class ArrayDataset(ABC):
    """Samples, gathered a batch at a time: no collation, and in memory no Python for each of them."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def gather(self, indices: Tensor, rng: CounterRNG | None = None) -> Batch:
        """The samples at ``indices``, stacked.

        Parameters
        ----------
        indices
            Positions, int64 [B].
        rng
            Source of the random augmentation; None for none.
        """

    def __getitems__(self, indices: list[int]) -> Batch:
        """The samples at ``indices`` without augmentation, stacked."""
        return self.gather(torch.tensor(indices, dtype=torch.int64))

    def subset(self, indices: Tensor) -> ArrayDataset:
        """A view of the samples at ``indices``, int64 [n]; nothing is copied."""
        return SubsetView(self, indices)

    def take(self, n: int) -> ArrayDataset:
        """A view of the first ``n`` samples (of all, if there are fewer)."""
        return self.subset(torch.arange(min(n, len(self))))


class SubsetView(ArrayDataset):
    """Some samples of another data set; augmentation still sees the positions in the whole one."""

    def __init__(self, whole: ArrayDataset, indices: Tensor) -> None:
        self.whole, self.indices = whole, indices

    def __len__(self) -> int:
        return len(self.indices)

    def gather(self, indices: Tensor, rng: CounterRNG | None = None) -> Batch:
        """The samples at ``indices`` of the view, stacked."""
        return self.whole.gather(self.indices[indices], rng)

    def subset(self, indices: Tensor) -> ArrayDataset:
        """A view of this view, one level deep."""
        return SubsetView(self.whole, self.indices[indices])


@dataclass(frozen=True)
class Splits:
    """Parts of a data set; a part that was not asked for is None.

    Attributes
    ----------
    classes
        Labels from 0 on, or tokens, that occur at most; None where nothing is counted.
    """

    train: ArrayDataset
    validation: ArrayDataset | None
    test: ArrayDataset | None
    classes: int | None = None


class DataConfig(ABC):
    """A data set to choose in a recipe; each kind is a keyword-only dataclass.

    Attributes
    ----------
    limit
        Use only the first so many training samples, for smoke runs; None for all.
    """

    limit: int | None

    def build(self) -> Splits:
        """Load the data, checked, split, and cut to ``limit``.

        Raises
        ------
        DataError
            A file is missing, damaged or of another form; the message says how to get it.
        """
        splits = self._load()
        if self.limit is None:
            return splits
        return replace(splits, train=splits.train.take(self.limit))

    @abstractmethod
    def _load(self) -> Splits: ...

    def _check_limit(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(
                "data.limit", self.limit, "must be at least 1", fix="Leave it out for all samples."
            )


def check_fractions(validation: float, test: float) -> None:
    """Raise :class:`ConfigError` unless both parts are in [0, 1) and leave something to train on."""
    for name, value in (("validation_fraction", validation), ("test_fraction", test)):
        if not 0 <= value < 1:
            raise ConfigError(f"data.{name}", value, "must lie in [0, 1)")
    if validation + test >= 1:
        raise ConfigError(
            "data.validation_fraction + data.test_fraction",
            validation + test,
            "must leave a part to train on, i.e. lie below 1",
        )
