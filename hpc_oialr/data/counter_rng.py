"""Random numbers as a pure function of (seed, epoch, sample): no state, so nothing to save or to agree on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1

SPLIT_SEED = 0
"""Splits of a data set use this seed, so that they are the same for every seed of a run."""


def _finalise(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea, Flood, OOPSLA 2014; constants: Stafford's mix 13)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True)
class CounterRNG:
    """The random numbers of one epoch of one run.

    The same on every machine, for every number of processes, and after a resume; independent of
    torch's generators.

    Parameters
    ----------
    seed
        The run's seed, any integer.
    epoch
        Index of the epoch, from 0.
    """

    seed: int
    epoch: int = 0

    def bits(self, samples: NDArray[np.int64], stream: int) -> NDArray[np.uint64]:
        """64 random bits for each sample, shape of ``samples``; another ``stream``, other numbers."""
        key = 0
        for part in (self.seed, self.epoch, stream):
            word = np.array([(key + _GOLDEN * (part + 1)) & _MASK], dtype=np.uint64)
            key = int(_finalise(word)[0])
        counter = samples.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)
        return _finalise(counter)

    def integers(self, samples: NDArray[np.int64], high: int, *, stream: int) -> NDArray[np.int64]:
        """One integer in [0, high) for each sample; the bias of the remainder is below high / 2^64."""
        return (self.bits(samples, stream) % np.uint64(high)).astype(np.int64)

    def uniform(self, samples: NDArray[np.int64], *, stream: int) -> NDArray[np.float64]:
        """One number in [0, 1) for each sample, a multiple of 2^-53."""
        return (self.bits(samples, stream) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def permutation(self, n: int) -> Tensor:
        """A random order of ``range(n)``, int64 [n].

        Examples
        --------
        >>> CounterRNG(seed=0).permutation(5).sort().values.tolist()
        [0, 1, 2, 3, 4]
        """
        keys = self.bits(np.arange(n, dtype=np.int64), stream=0)
        return torch.from_numpy(np.argsort(keys, kind="stable").astype(np.int64, copy=False))
