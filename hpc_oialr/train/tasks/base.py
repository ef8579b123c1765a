"""What every task offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from hpc_oialr.data.base import Batch
from hpc_oialr.errors import ConfigError


@dataclass(frozen=True)
class StepRNG:
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
        """A generator of its own for every moment."""
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
    inputs
        What a batch must hold.
    outputs
        The model's setting that says among how many labels or tokens it chooses; None if it chooses none.
    """

    inputs: ClassVar[tuple[str, ...]]
    outputs: ClassVar[str | None] = None
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]
    unit: ClassVar[str]

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, rng: StepRNG) -> Tensor:
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

    def check(self, example: Batch, classes: int | None, model: object) -> None:
        """Raise :class:`ConfigError` unless data, model settings and this task fit each other.

        Parameters
        ----------
        example
            A batch of the data.
        classes
            How many labels or tokens the data have, if that is known.
        model
            The model's settings.
        """
        name, held = type(self).__name__, ", ".join(sorted(example))
        missing = [key for key in self.inputs if key not in example]
        if missing:
            rule = f"needs batches with {missing[0]!r}; the data give {held}"
            raise ConfigError("task", name, rule, fix="Choose the task that belongs to the data.")
        chosen = getattr(model, self.outputs, None) if self.outputs else None
        if chosen is not None and classes is not None and chosen < classes:
            rule = f"must be at least {classes}: the data have that many"
            raise ConfigError(f"model.{self.outputs}", chosen, rule)

    def better(self, value: float, best: float | None) -> bool:
        """Whether ``value`` beats ``best``."""
        if best is None:
            return True
        return value > best if self.higher_is_better else value < best
