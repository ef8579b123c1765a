"""Training of an operator's leading functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from hpc_oialr.errors import ConfigError, NonFiniteError, check_interval
from hpc_oialr.linalg.communicator import Communicator, Group, communicator
from hpc_oialr.linalg.splitmix import mix
from hpc_oialr.operators.nested_lora import Estimates, Nesting, Side, estimates, masks, nested_lora, sum_gradients


class Problem(Protocol):
    """An operator, the form of its functions and its minibatches."""

    def functions(self, L: int) -> nn.Module:
        """Networks for L functions, on one side or two."""

    def sides(self, model: nn.Module, batch: int, generator: torch.Generator, comm: Communicator) -> list[Side]:
        """This rank's part of a minibatch of ``batch`` points."""

    def spectrum(self, found: Estimates) -> list[float]:
        """Eigenvalues or singular values of the functions, in their order."""

    def exact(self, L: int) -> list[float]:
        """What they should be."""


@dataclass(frozen=True)
class Settings:
    """What is trained, and how.

    Attributes
    ----------
    functions
        L, how many are looked for.
    batch
        Points of a step, on all ranks together.
    steps, lr
        Adam's; its learning rate rises over the first 2 % of the steps and falls to 0 along a cosine.
    nesting
        See :mod:`~hpc_oialr.operators.nested_lora`.
    balance
        See :func:`~hpc_oialr.operators.nested_lora.nested_lora`; for values of very different size.
    seed
        Of the networks' first weights and of all points.
    """

    functions: int = 10
    batch: int = 1024
    steps: int = 10_000
    lr: float = 1e-3
    nesting: Nesting = "sequential"
    balance: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("functions", "batch", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be at least 1")
        check_interval("seed", self.seed, 0, 1 << 63, closed=(True, False))
        check_interval("lr", self.lr, 0, math.inf)
        masks(1, self.nesting)


class Trained(NamedTuple):
    """Functions after some steps."""

    model: nn.Module
    state: dict[str, Any]  # to go on from, see train()


def train(
    problem: Problem,
    settings: Settings,
    *,
    group: Group = None,
    state: Mapping[str, Any] | None = None,
    until: int | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train from the beginning, or from an earlier ``state``, to the end or ``until`` a step.

    The points of a step depend on the seed and its number alone: on a CPU training goes on from a state with the same
    bits, and P ranks compute the gradients of one with the same ``batch``, up to rounding. ``progress`` is called after
    each step with its number and loss. Raises NonFiniteError if the loss is no longer finite.
    """
    comm = communicator(group)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = problem.functions(settings.functions)
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=settings.lr)
    done = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    end = settings.steps if until is None else min(until, settings.steps)
    for step in range(done, end):
        for each in optimizer.param_groups:
            each["lr"] = settings.lr * schedule(step, settings.steps)
        sides = problem.sides(model, settings.batch, generator_of(settings.seed, step), comm)
        loss = nested_lora(sides, nesting=settings.nesting, balance=settings.balance, group=comm)
        optimizer.zero_grad()
        loss.backward()
        sum_gradients(parameters, comm)
        optimizer.step()
        if not math.isfinite(value := float(loss.detach())):
            raise NonFiniteError(f"the loss is {value} in step {step}. Lower lr, {settings.lr:g} now, or raise batch.")
        if progress is not None:
            progress(step + 1, value)
    return Trained(model, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": end})


def schedule(step: int, steps: int) -> float:
    """The learning rate's factor."""
    warmup = max(1, steps // 50)
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


def generator_of(seed: int, step: int) -> torch.Generator:
    """For the points of a step; -1 is the evaluation's."""
    return torch.Generator().manual_seed(mix(mix(seed) + step) % (1 << 63))


@torch.no_grad()
def evaluate(
    problem: Problem, model: nn.Module, settings: Settings, *, batch: int = 1 << 16, group: Group = None
) -> Estimates:
    """Inner products over ``batch`` points, others than in training; of a matrix over all of it."""
    comm = communicator(group)
    return estimates(problem.sides(model, batch, generator_of(settings.seed, -1), comm), comm)
