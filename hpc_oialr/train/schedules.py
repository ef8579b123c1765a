"""Learning-rate schedules as typed settings: the factor is a pure function of the step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hpc_oialr.errors import ConfigError, check_interval


class ScheduleConfig(ABC):
    """Settings of one schedule."""

    @abstractmethod
    def factor(self, step: int, total: int, epoch: int = 1) -> float:
        """What the learning rates of step ``step`` (from 0) of ``total`` are multiplied by.

        ``epoch`` is the number of steps of a pass over the training data.
        """

    def build(self, optimizer: Optimizer, total: int, epoch: int = 1) -> LearningRates:
        """The schedule of a run; arguments as for :meth:`factor`."""
        return LearningRates(optimizer, lambda step: self.factor(step, total, epoch))


@dataclass(kw_only=True)
class Constant(ScheduleConfig):
    """The optimizer's learning rates, unchanged."""

    def factor(self, step: int, total: int, epoch: int = 1) -> float:
        """Always 1."""
        return 1.0


@dataclass(kw_only=True)
class StepDecay(ScheduleConfig):
    """The learning rates times ``decay`` after every so many epochs.

    Parameters
    ----------
    decay
        In (0, 1].
    epochs
        Passes over the training data between two steps down.
    """

    decay: float = 0.5
    epochs: float = 1.0

    def __post_init__(self) -> None:
        check_interval("decay", self.decay, 0, 1, closed=(False, True))
        check_interval("epochs", self.epochs, 0, math.inf)

    def factor(self, step: int, total: int, epoch: int = 1) -> float:
        """A power of ``decay``."""
        return float(self.decay ** (step // max(1, round(self.epochs * epoch))))


@dataclass(kw_only=True)
class WarmupCosine(ScheduleConfig):
    """Linear warm-up, then half a cosine with k-decay. arXiv 1608.03983, 2004.05909.

    With t the share of the steps after the warm-up, the factor is
    ``final + (1 - final) (1 + cos(pi t^k_decay)) / 2``.

    Parameters
    ----------
    warmup
        Share of all steps, in [0, 1).
    warmup_steps
        Number of steps instead.
    warmup_epochs
        Number of passes over the training data instead.
    k_decay
        1 is the plain cosine; below 1 the rate falls sooner.
    final
        Factor at the end.
    """

    warmup: float = 0.05
    warmup_steps: int | None = None
    warmup_epochs: float | None = None
    k_decay: float = 1.0
    final: float = 0.0

    def __post_init__(self) -> None:
        check_interval("warmup", self.warmup, 0, 1, closed=(True, False))
        check_interval("k_decay", self.k_decay, 0, math.inf)
        check_interval("final", self.final, 0, 1, closed=(True, True))
        for name in ("warmup_steps", "warmup_epochs"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(name, getattr(self, name), "must not be negative")
        if self.warmup_steps is not None and self.warmup_epochs is not None:
            raise ConfigError("warmup_steps", self.warmup_steps, "cannot be given beside warmup_epochs")

    def factor(self, step: int, total: int, epoch: int = 1) -> float:
        """Warm-up, then cosine."""
        if self.warmup_epochs is not None:
            warmup = round(self.warmup_epochs * epoch)
        else:
            warmup = round(self.warmup * total) if self.warmup_steps is None else self.warmup_steps
        if step < warmup:
            return (step + 1) / warmup
        share = min(1.0, (step - warmup) / max(1, total - warmup))
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * share**self.k_decay))


class LearningRates:
    """Sets every group's learning rate to its initial value times ``factor(step)``.

    Groups keep their order when the method replaces parameters in them.

    Attributes
    ----------
    current
        Learning rate of the first group.
    device
        Where the rates are tensors (fp32), for steps that a CUDA graph holds; None for numbers.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float]) -> None:
        self.optimizer, self.factor = optimizer, factor
        self.base = [float(group["lr"]) for group in optimizer.param_groups]
        self.current = self.base[0]
        self.device: torch.device | None = None

    def set(self, step: int) -> None:
        """Set the learning rates for step ``step`` (from 0)."""
        factor = self.factor(step)
        self.current = self.base[0] * factor
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            if self.device is None:
                group["lr"] = base * factor
            elif isinstance(group["lr"], Tensor):
                group["lr"].fill_(base * factor)
            else:
                group["lr"] = torch.tensor(base * factor, dtype=torch.float32, device=self.device)

    def state_dict(self) -> dict[str, Any]:
        """Initial learning rates, fit for JSON."""
        return {"base": list(self.base)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load :meth:`state_dict`."""
        self.base = [float(base) for base in state["base"]]
