"""A learning rate of their own for cores, without changing the user's parameter groups."""

from __future__ import annotations

import copyreg
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence, Set
from typing import Any, cast
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Muon, Optimizer
from torch.utils.hooks import RemovableHandle

from hpc_oialr.errors import ConfigError
from hpc_oialr.lowrank.base import whole_shape
from hpc_oialr.optim.muon import CORE_LR_RATIO, MuonAdamW
from hpc_oialr.optim.stack import Group, OptimizerStack
from hpc_oialr.optim.state_kinds import KEPT_BY_WRAPPERS, kind_of, kinds_of

# Their step does not grow with the gradient.
ADAPTIVE = (
    "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "AdaMax", "Adagrad", "RMSprop", "AdamP", "AdaBelief", "Adan", "ADOPT",
    "Adopt", "AdEMAMix", "AdaBound", "AdaPNM", "DiffGrad", "Grams", "LaProp", "Lion", "MARS", "Mars", "NAdamW",
    "QHAdam", "RMSpropTF", "Rprop", "SignSGD", "StableAdamW", "Tiger", "Yogi",
)  # fmt: skip
_ATTRIBUTE = "_core_learning_rate"


class CoreLearningRate:
    """Multiplies the step that the optimizers give each core by a factor.

    Groups, schedulers and scalers stay as they are: a hook before the step copies the cores, one after it scales the
    difference. Equivalent to a learning rate times that factor in any optimizer whose step is proportional to it.
    Copies and pickles of such an optimizer have the hooks too, which torch's own do not.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.factors: dict[nn.Parameter, float] = {}
        self.steps = 0  # of all optimizers together
        # Cores that had a gradient in such a step, and parameters that cores have replaced; cleared by the reader.
        self.due: set[nn.Parameter] = set()
        self.replaced: list[ReferenceType[nn.Parameter]] = []
        self._optimizers = list(optimizers)
        for optimizer in self._optimizers:
            # Hooks of an earlier controller: two factors would be multiplied.
            if (earlier := vars(optimizer).get(_ATTRIBUTE)) is not None:
                earlier.remove()
        self._attach()

    def _attach(self) -> None:
        self._before: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}
        self._handles: list[RemovableHandle] = []
        for optimizer in self._optimizers:
            # An optimizer that is just being copied or unpickled has no attributes yet.
            for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
                vars(optimizer).setdefault(name, OrderedDict())
            self._handles.append(optimizer.register_step_pre_hook(self._remember))
            self._handles.append(optimizer.register_step_post_hook(self._stretch))
            vars(optimizer)[_ATTRIBUTE] = self
            copyreg.pickle(type(optimizer), _reduce_with_hooks)

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_before", "_handles", "due", "replaced")
        return {key: value for key, value in vars(self).items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.due, self.replaced = set(), []
        self._attach()

    def set(self, core: nn.Parameter, factor: float, *, replaces: nn.Parameter | None = None) -> None:
        """Use ``factor`` for ``core`` from the next step on, and forget the weight or core it ``replaces``."""
        if replaces is not None:
            self.factors.pop(replaces, None)
            self.replaced.append(ref(replaces))
        self.factors[core] = factor

    def _groups(self) -> Iterator[Group]:
        return (group for optimizer in self._optimizers for group in optimizer.param_groups)

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters of these optimizers."""
        return (p for group in self._groups() for p in group["params"])

    def at_rest(self, cores: Set[nn.Parameter]) -> bool:
        """Whether one of these has a learning rate of 0."""
        return any(
            float(group.get("lr", 1.0)) == 0 and not cores.isdisjoint(group["params"]) for group in self._groups()
        )

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        for optimizer in self._optimizers:
            vars(optimizer).pop(_ATTRIBUTE, None)
        self.factors.clear()

    @torch.no_grad()
    def _remember(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A closure computes the gradients inside the step.
        closure = kwargs.get("closure") is not None or any(callable(arg) for arg in args[1:])
        cores = [
            p
            for group in optimizer.param_groups
            for p in group["params"]
            if self.factors.get(p, 1.0) != 1.0 and (closure or p.grad is not None)
        ]
        # Times one: copies of all of them in one launch.
        copies = torch._foreach_mul(cast(list[Tensor], cores), 1.0) if cores else ()
        self._before[id(optimizer)] = list(zip(cores, copies, strict=True))

    @torch.no_grad()
    def _stretch(self, optimizer: Optimizer, *_: Any) -> None:
        self.steps += 1
        self.due |= {p for p in self.factors if p.grad is not None}
        before = self._before.pop(id(optimizer), [])
        if not before:
            return
        cores: list[Tensor] = [p for p, _ in before]
        steps = torch._foreach_sub(cores, [value for _, value in before])
        torch._foreach_mul_(steps, [self.factors[p] - 1.0 for p, _ in before])
        torch._foreach_add_(cores, list(steps))


def _reduce_with_hooks(optimizer: Optimizer) -> Any:
    """As ``copy`` and ``pickle`` reduce an optimizer, with the object that registers the hooks of its copy."""
    reduced: Any = optimizer.__reduce_ex__(4)
    made, arguments, state = reduced[:3]
    if _ATTRIBUTE in vars(optimizer) and isinstance(state, dict):
        state = {**state, _ATTRIBUTE: vars(optimizer)[_ATTRIBUTE]}
        if isinstance(optimizer, LBFGS):
            # torch's own copies of it have no parameters.
            state = {**state, "_params": optimizer._params, "_numel_cache": None}
    return made, arguments, state


def core_factor(stack: OptimizerStack, core: nn.Parameter, m: int, n: int, scale: float | str) -> float:
    """What the step of a core of an m x n weight is multiplied by.

    ``scale`` times what Muon's own shape factor loses when m x n becomes the core's r x r, or r_out x (r_in K) of a
    Tucker layer. With ``scale="auto"``: 1 for SGD, whose
    step does not depend on the basis, for a group of cores, which has a learning rate of its own, and where the state
    holds weights; :func:`adam_scale` for Adam-like optimizers; ``CORE_LR_RATIO`` for Muon.
    """
    rows, columns = whole_shape(core)
    optimizer, group = stack.home(core)
    if isinstance(optimizer, Muon) or (isinstance(optimizer, MuonAdamW) and group["algorithm"] == "muon"):
        if isinstance(scale, str):
            scale = 1.0 if group.get("cores") else CORE_LR_RATIO
        if group.get("adjust_lr_fn") == "match_rms_adamw":
            lost = max(m, n) / max(rows, columns)
        else:
            lost = max(1.0, m / n) / max(1.0, rows / columns)
        return scale * float(lost**0.5)
    if not isinstance(scale, str):
        return scale
    names = {kind.__name__ for kind in type(optimizer).__mro__}
    adaptive = isinstance(optimizer, MuonAdamW) or not names.isdisjoint(ADAPTIVE)
    return adam_scale(m, n, math.sqrt(rows * columns)) if adaptive and not _fixed_step(optimizer, core) else 1.0


def check_core_factor(stack: OptimizerStack, parameter: nn.Parameter, scale: float | str) -> None:
    """Raise :class:`ConfigError` for a factor other than 1 where the optimizer's state determines the weight."""
    optimizer, _ = stack.home(parameter)
    fixed = _fixed_step(optimizer, parameter)
    if fixed and not isinstance(scale, str) and scale != 1.0:
        raise ConfigError(
            "core_lr_scale",
            scale,
            f'must be 1 or "auto" with {type(optimizer).__name__}, whose state ({fixed}) determines the next weight',
            fix="Set the learning rate instead.",
        )


def _fixed_step(optimizer: Optimizer, core: nn.Parameter) -> str:
    """State with which a scaled step would be wrong: weights that the optimizer steps itself, a history."""
    if isinstance(optimizer, LBFGS):
        return "its history of steps"
    keys = dict.fromkeys([*kinds_of(optimizer), *optimizer.state.get(core, {})])
    found = [key for key in keys if kind_of(optimizer, key) == "weight" and key not in KEPT_BY_WRAPPERS]
    return ", ".join(found)


def adam_scale(m: int, n: int, r: float) -> float:
    """Adam moves ``S`` by lr r in norm where the dense weight moved by lr sqrt(m n): their ratio's root.

    The full ratio overshoots: in exploratory runs of one seed a factor of 3 was better than 1.2 and 6,
    where the full ratio is 4 to 8 and its root 2 to 2.8.
    """
    return float((m * n) ** 0.25 / r**0.5)
