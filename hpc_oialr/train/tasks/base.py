"""What every task offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Moment:
    """Where a run stands: what random choices of a task are a function of, the same on every process.

    Attributes
    ----------
    seed, step, part
        The run's seed, the step, and which part of an accumulated step.
    """

    seed: int
    step: int
    part: int = 0

    def generator(self) -> np.random.Generator:
        """Random numbers of this moment."""
        return np.random.default_rng((self.seed, self.step, self.part))


class Task(ABC):
    """Settings of one task.

    Attributes
    ----------
    metric
        Name of what is judged.
    higher_is_better
        Its direction.
    unit
        What :meth:`count` counts.
    """

    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]
    unit: ClassVar[str]

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, moment: Moment) -> Tensor:
        """Training loss, the mean over the samples of ``batch``; a scalar with a graph."""

    @abstractmethod
    def totals(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sums over ``batch`` from which :meth:`metrics` makes means; float64, the count last."""

    @abstractmethod
    def metrics(self, totals: Tensor) -> dict[str, float]:
        """``loss`` and the metric, from the sums over a whole data set."""

    @abstractmethod
    def count(self, batch: Batch) -> int:
        """How many units a batch holds."""

    def better(self, value: float, best: float | None) -> bool:
        """Whether ``value`` beats ``best``."""
        if best is None:
            return True
        return value > best if self.higher_is_better else value < best
