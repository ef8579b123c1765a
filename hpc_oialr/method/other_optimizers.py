"""Detects that another optimizer trains the weights, or that no optimizer trains the cores."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from hpc_oialr.errors import ModelError
from hpc_oialr.lowrank import TargetWeight
from hpc_oialr.lowrank.marks import optimizer_in_hooks
from hpc_oialr.method.engine import Engine
from hpc_oialr.method.participants import trained_parameter
from hpc_oialr.optim.core_lr import CoreLearningRate

# Steps in a row that only other optimizers made. One may be a weight clipped in a step that a GradScaler skipped.
PATIENCE = 3
# Steps in a row in which no core has changed though all have gradients.
IDLE = 4


class OtherOptimizers:
    """Compares writes to the trained weights and cores with the steps of the optimizer given to the controller.

    An optimizer made anew during a run, or one per parameter in backward hooks, uses the rates of dense weights, and
    keeps the old parameters when shapes change. One that hides its parameters, e.g. in a closure, continues to step
    the dense weights and never the cores.

    ``core_lr`` counts the given optimizer's steps. Nothing is compared if the ``engine`` steps an optimizer of its own.
    """

    def __init__(self, core_lr: CoreLearningRate, engine: Engine) -> None:
        self._core_lr, self._off, self._stored = core_lr, engine.steps_itself, engine.local_shard
        self._steps = core_lr.steps
        self._versions: dict[int, int] = {}
        self._rest: dict[int, int] = {}
        self._idle = 0
        self._values: dict[nn.Parameter, Tensor] = {}
        # Calls in all; in a row after steps of others only; after others had written every weight.
        self._calls = self._others_only = self._all_written = 0

    def __getstate__(self) -> dict[str, object]:
        # Ids and versions are those of this process's objects.
        return {**vars(self), "_versions": {}, "_rest": {}, "_idle": 0, "_values": {}}

    def check(self, targets: Iterable[TargetWeight]) -> None:
        """Raise :class:`ModelError` after :data:`PATIENCE` calls in a row before which only others stepped."""
        if self._off:
            return
        self._warn_of_lists()
        targets = list(targets)
        versions = _versions(targets)
        self._check_idle(targets, versions)
        written = [self._versions.get(key, version) != version for key, version in versions.items()]
        self._calls += 1
        if self._core_lr.steps != self._steps:
            self._others_only = 0
        elif any(written):
            self._others_only += 1
            self._all_written += all(written)
        if self._others_only >= PATIENCE:
            self._refuse()
        self._steps, self._versions = self._core_lr.steps, versions

    def check_conversion(self, targets: Iterable[TargetWeight], optimizers: Sequence[Any]) -> None:
        """Raise :class:`ModelError` if only others have trained since the start, so that no core misses a step.

        Optimizers in hooks have been named in a warning, and :meth:`check` raises for them.
        """
        if self._core_lr.steps == 0 and 0 < self._all_written == self._calls:
            weights = [target.stored for target in targets]
            if not any(w is not None and optimizer_in_hooks(w, optimizers) is not None for w in weights):
                self._refuse()

    def _refuse(self) -> NoReturn:
        times = "time" if self._others_only == 1 else "times"
        raise ModelError(
            f"the weights were changed {self._others_only} {times} while the optimizer given to OIALR(...) did not step: "
            "another optimizer trains them (one made anew, or one in backward hooks), which would continue with dense "
            "weights and rates. Step the given optimizer, or make a new OIALR(...) with the one that is stepped."
        )

    def forget(self) -> None:
        """Call this when values are loaded."""
        self._versions = {}

    def remember(self, targets: Iterable[TargetWeight]) -> None:
        """Call this after the method itself has written."""
        self._versions, self._values = _versions(targets), {}

    def _warn_of_lists(self) -> None:
        """Warn of lists of parameters, e.g. for clipping or decay, made before a change: they contain no cores."""
        replaced = self._core_lr.replaced
        if any(each() is not None for each in replaced):
            gc.collect()  # of a deleted optimizer, as in a run that is resumed in the same process
        held = [p for each in replaced if (p := each()) is not None]
        replaced.clear()
        if not held:
            return
        ids = {id(p) for p in held}
        holders = [each for each in gc.get_referrers(*held) if type(each) in (list, tuple, dict)]
        holders = [each for each in holders if each is not held and not _is_of_wrapper(each)]
        items = ([*each.keys(), *each.values()] if isinstance(each, dict) else each for each in holders)
        found = {id(p): p for each in items for p in each if id(p) in ids}
        if found:
            first = tuple(next(iter(found.values())).shape)
            warnings.warn(
                f"{len(found)} parameters that OIALR has replaced, the first of shape {first}, are still in a "
                f"{type(holders[0]).__name__} of the program: what goes over it, such as clipping, weight decay or an "
                "average, misses the cores, and the memory is not freed. Make it anew from model.parameters().",
                stacklevel=4,
            )

    def _check_idle(self, targets: Iterable[TargetWeight], versions: dict[int, int]) -> None:
        held = [trained_parameter(target) for target in targets if target.low_rank is not None]
        cores = {S for S in held if S is not None}
        due = {S for S in cores if S.requires_grad and (S.grad is not None or S in self._core_lr.due)}
        self._core_lr.due.clear()
        rest = {id(p): p._version for p in self._core_lr.parameters() if p not in cores}
        others = any(self._rest.get(key, version) != version for key, version in rest.items())
        self._rest = rest
        if any(self._versions.get(id(S)) != versions.get(id(S)) for S in cores):
            self._idle = 0
        elif due and others:
            # Writes through ``.data`` do not change versions.
            values = {S: self._stored(S) for S in due}
            if not all(S in values and torch.equal(values[S], old) for S, old in self._values.items()):
                self._idle = 0
            if self._idle == 0 or not self._values:
                self._values = {S: value.clone() for S, value in values.items()}
            self._idle += 1
        if self._idle >= IDLE and not self._core_lr.at_rest(due):
            raise ModelError(
                f"the cores of the low-rank layers had gradients and stayed as they are in {IDLE} steps, in which "
                "other parameters were trained: the optimizer, or the loop, keeps a list of the dense parameters that "
                "OIALR has replaced. Let it read optimizer.param_groups or model.parameters() anew in each step."
            )


def _is_of_wrapper(container: Any) -> bool:
    """Whether it is DistributedDataParallel's own list, of which torch.compile keeps an older one."""
    holders = (each for each in gc.get_referrers(container) if type(each) is dict)
    return any(each.get("_module_parameters") is container for each in holders)


def _versions(targets: Iterable[TargetWeight]) -> dict[int, int]:
    """How often each weight or core has been written; weights that the user removed are left out."""
    return {id(p): p._version for target in targets if (p := trained_parameter(target)) is not None}
