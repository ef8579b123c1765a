"""Notices that another optimizer trains what the given one should, and that none trains the cores."""

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
from hpc_oialr.optim.core_lr import CoreLearningRate

# One such step may be a weight clipped in a step that a GradScaler skipped.
PATIENCE = 3
# Steps in a row in which no core has moved though all have gradients.
IDLE = 4


class ForeignSteps:
    """Compares who wrote into the trained weights and cores with who has stepped.

    An optimizer that is replaced in the middle of a run, or one for each parameter in backward hooks, trains with the
    rates of dense weights, and keeps the old parameters when shapes change. One that keeps its parameters
    out of sight, such as in a closure, continues with the dense weights and leaves the cores as they are.

    ``core_lr`` counts the steps of the optimizer given to the controller; nothing is compared where the ``engine`` steps
    an optimizer of its own.
    """

    def __init__(self, core_lr: CoreLearningRate, engine: Engine) -> None:
        self._core_lr, self._off, self._stored = core_lr, engine.steps_itself, engine.local_shard
        self._steps = core_lr.steps
        self._versions: dict[int, int] = {}
        self._rest: dict[int, int] = {}
        self._idle = 0
        self._values: dict[nn.Parameter, Tensor] = {}
        # Calls in all, those in a row before which only others had stepped, and those before which they wrote everything.
        self._calls = self._foreign = self._wholly = 0

    def __getstate__(self) -> dict[str, object]:
        # Identities and versions are of this process's objects.
        return {**vars(self), "_versions": {}, "_rest": {}, "_idle": 0, "_values": {}}

    def check(self, targets: Iterable[TargetWeight]) -> None:
        """Raise :class:`ModelError` after :data:`PATIENCE` calls in a row before which only others have stepped."""
        if self._off:
            return
        self._warn_of_lists()
        targets = list(targets)
        versions = _versions(targets)
        self._check_idle(targets, versions)
        written = [self._versions.get(key, version) != version for key, version in versions.items()]
        self._calls += 1
        if self._core_lr.steps != self._steps:
            self._foreign = 0
        elif any(written):
            self._foreign += 1
            self._wholly += all(written)
        if self._foreign >= PATIENCE:
            self._refuse()
        self._steps, self._versions = self._core_lr.steps, versions

    def check_conversion(self, targets: Iterable[TargetWeight], optimizers: Sequence[Any]) -> None:
        """Raise :class:`ModelError` if only others have trained since the start: no core shall miss a step.

        Those that step a weight in a hook have been named in a warning; they are stopped by :meth:`check`.
        """
        if self._core_lr.steps == 0 and 0 < self._wholly == self._calls:
            weights = [target.stored for target in targets]
            if not any(w is not None and optimizer_in_hooks(w, optimizers) is not None for w in weights):
                self._refuse()

    def _refuse(self) -> NoReturn:
        times = "time" if self._foreign == 1 else "times"
        raise ModelError(
            f"the weights were changed {self._foreign} {times} while the optimizer given to OIALR(...) did not step: "
            "another optimizer trains them (one made anew, or one in backward hooks), which would go on with dense "
            "weights and rates. Step the given optimizer, or make a new OIALR(...) with the one that is stepped."
        )

    def forget(self) -> None:
        """To be called when values are loaded."""
        self._versions = {}

    def remember(self, targets: Iterable[TargetWeight]) -> None:
        """To be called when the method itself has written."""
        self._versions, self._values = _versions(targets), {}

    def _warn_of_lists(self) -> None:
        """A list of parameters that was made before a change, for clipping or decay say, has no cores in it."""
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
        held = [target.low_rank._parameters.get("S") for target in targets if target.low_rank is not None]
        cores = {S for S in held if isinstance(S, nn.Parameter)}
        due = {S for S in cores if S.requires_grad and (S.grad is not None or S in self._core_lr.due)}
        self._core_lr.due.clear()
        rest = {id(p): p._version for p in self._core_lr.parameters() if p not in cores}
        others = any(self._rest.get(key, version) != version for key, version in rest.items())
        self._rest = rest
        if any(self._versions.get(id(S)) != versions.get(id(S)) for S in cores):
            self._idle = 0
        elif due and others:
            # Versions do not tell of what is written through ``.data``.
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
    """How often each weight or core has been written; a weight that its user took away is left out."""
    layers = ((target, target.low_rank) for target in targets)
    held = [target.stored if layer is None else layer._parameters.get("S") for target, layer in layers]
    return {id(p): p._version for p in held if isinstance(p, nn.Parameter)}
