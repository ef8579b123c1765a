"""A learning rate of their own for cores, without touching the user's parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Muon, Optimizer

from hpc_oialr.optim.muon import CORE_LR_RATIO, MuonAdamW

ADAPTIVE = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop", "Adafactor")


class CoreLearningRate:
    """Multiplies the step that ``optimizer`` gives each core by a factor of its own.

    Groups, schedulers and scalers stay as they are: a hook before the step keeps the cores' values,
    one after it stretches the difference. Equivalent to a learning rate times that factor in any
    optimizer whose step is proportional to it. Costs a copy of the cores during the step.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.factors: dict[nn.Parameter, float] = {}
        self._before: list[tuple[nn.Parameter, Tensor]] = []
        optimizer.register_step_pre_hook(self._remember)
        optimizer.register_step_post_hook(self._stretch)

    def set(self, core: nn.Parameter, factor: float, *, replaces: nn.Parameter | None = None) -> None:
        """Use ``factor`` for ``core`` from the next step on, and forget the core it ``replaces``."""
        if replaces is not None:
            self.factors.pop(replaces, None)
        self.factors[core] = factor

    @torch.no_grad()
    def _remember(self, *_: Any) -> None:
        moving = [p for p, factor in self.factors.items() if factor != 1.0 and p.grad is not None]
        self._before = [(p, p.clone()) for p in moving]

    @torch.no_grad()
    def _stretch(self, *_: Any) -> None:
        if not self._before:
            return
        cores: list[Tensor] = [p for p, _ in self._before]
        steps = torch._foreach_sub(cores, [value for _, value in self._before])
        torch._foreach_mul_(steps, [self.factors[p] - 1.0 for p, _ in self._before])
        torch._foreach_add_(cores, list(steps))
        self._before = []


def core_factor(optimizer: Optimizer, core: nn.Parameter, m: int, n: int, scale: float | str) -> float:
    """What the step of a core (r x r) of an m x n weight is multiplied by.

    ``scale`` times what Muon's own shape factor loses when m x n becomes r x r. With
    ``scale="auto"``: 1 for SGD, whose step does not depend on the basis, and for a group of cores,
    which has a learning rate of its own; :func:`adam_scale` for Adam-like optimizers;
    ``CORE_LR_RATIO`` for Muon.
    """
    r = core.shape[0]
    group = next(g for g in optimizer.param_groups if any(p is core for p in g["params"]))
    if isinstance(optimizer, Muon) or (isinstance(optimizer, MuonAdamW) and group["algorithm"] == "muon"):
        automatic = 1.0 if group.get("cores") else CORE_LR_RATIO
        return (automatic if isinstance(scale, str) else scale) * _muon_shape_factor(group, m, n, r)
    if not isinstance(scale, str):
        return scale
    adaptive = isinstance(optimizer, MuonAdamW) or type(optimizer).__name__ in ADAPTIVE
    return adam_scale(m, n, r) if adaptive else 1.0


def adam_scale(m: int, n: int, r: int) -> float:
    """Adam moves ``S`` by lr r in norm where the dense weight moved by lr sqrt(m n): their ratio's root.

    The full ratio overshoots: in exploratory runs of one seed a factor of 3 was better than 1.2 and 6,
    where the full ratio is 4 to 8 and its root 2 to 2.8.
    """
    return float((m * n) ** 0.25 / r**0.5)


def _muon_shape_factor(group: dict[str, Any], m: int, n: int, r: int) -> float:
    """The dense weight's shape factor over the square core's."""
    if group.get("adjust_lr_fn") == "match_rms_adamw":
        return float((max(m, n) / r) ** 0.5)
    return float(max(1.0, m / n) ** 0.5)
