"""Random numbers as a pure function of (seed, epoch, sample): no state to save or to synchronise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpc_oialr.linalg.splitmix import INCREMENT, mix, shift_right, signed

# Splits of a data set use this seed, so that they are the same for every seed of a run.
SPLIT_SEED = 0


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
        """A random order of ``range(n)``, int64 [n].

        Examples
        --------
        >>> CounterRNG(seed=0).permutation(5).sort().values.tolist()
        [0, 1, 2, 3, 4]
        """
        # With the first bit flipped, signed numbers have the order of the unsigned ones.
        keys = self.bits(torch.arange(n), stream=0) ^ signed(1 << 63)
        return keys.argsort(stable=True)
