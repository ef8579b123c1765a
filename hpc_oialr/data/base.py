"""The interface of data sets: batches by index, a config that builds them, and their random numbers.

Random numbers are a pure function of (seed, epoch, sample): there is no state to save or to synchronise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hpc_oialr.errors import ConfigError, check_interval
from hpc_oialr.linalg.splitmix import INCREMENT, mix, shift_right, signed

Batch = dict[str, Tensor]
OnDevice = Literal["auto", "always", "never"]
MOST_ON_DEVICE = 2 * 2**30  # bytes


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
        bits = self.bits(samples, stream)
        # The remainder of the unsigned number, which torch does not have: of all bits but the last, then with it.
        return ((shift_right(bits, 1) % high) * 2 + (bits & 1)) % high

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

    # Attributes that hold all samples; gather() makes batches on whichever device they are.
    movable: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def gather(self, indices: Tensor, rng: CounterRNG | None = None) -> Batch:
        """Stack the samples at ``indices`` (int64 [B]), to be finished; ``rng`` draws the augmentation, None for none."""

    def finish(self, batch: Batch) -> Batch:
        """What is left to do with a batch where the model computes; by default nothing.

        There a GPU is faster at it, and less is sent to it.
        """
        return batch

    def example(self, size: int) -> Batch:
        """The first samples as a model sees them, at most ``size``."""
        return self.finish(self.gather(torch.arange(min(size, len(self)))))

    def tensors(self) -> list[tuple[ArrayDataset, str, Tensor]]:
        """Object, name and value of every attribute in ``movable``."""
        return [(self, name, getattr(self, name)) for name in self.movable]

    @property
    def device(self) -> torch.device:
        """Where batches are made."""
        found = self.tensors()
        return found[0][2].device if found else torch.device("cpu")

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

    def tensors(self) -> list[tuple[ArrayDataset, str, Tensor]]:
        """Those of the whole data set, and the positions."""
        found = self.whole.tensors()
        return found and [*found, (self, "indices", self.indices)]

    def __len__(self) -> int:
        return len(self.indices)

    def gather(self, indices: Tensor, rng: CounterRNG | None = None) -> Batch:
        """Stack the samples at ``indices`` of the view."""
        return self.whole.gather(self.indices[indices.to(self.indices.device)], rng)

    def finish(self, batch: Batch) -> Batch:
        """As the whole data set."""
        return self.whole.finish(batch)

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

    def keep_on(self, device: torch.device, choice: str) -> bool:
        """Move all samples of all parts to ``device``, in place, if they can and shall be; whether they were."""
        parts = [part for part in (self.train, self.validation, self.test) if part is not None]
        held = [part.tensors() for part in parts]
        distinct = {id(tensor): tensor for tensors in held for *_, tensor in tensors}
        fits = choice == "always" or sum(tensor.nbytes for tensor in distinct.values()) <= MOST_ON_DEVICE
        if device.type == "cpu" or choice == "never" or not (fits and all(held)):
            return False
        there = {key: tensor.to(device) for key, tensor in distinct.items()}
        for holder, name, tensor in (found for tensors in held for found in tensors):
            setattr(holder, name, there[id(tensor)])
        return True


class DataConfig(ABC):
    """A data set to choose in a recipe; each kind is a keyword-only dataclass.

    Attributes
    ----------
    limit
        Use only the first so many training samples, for smoke runs; None for all.
    on_device
        Keep all samples on the GPU and make batches there, of the same bits: "auto" up to 2 GiB, "always", "never".
    """

    limit: int | None
    on_device = "never"  # a field where the samples can be moved; annotated here, jsonargparse reads no type below

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
