"""Notices that another optimizer trains what the given one should."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from hpc_oialr.engines import Engine
from hpc_oialr.errors import ModelError
from hpc_oialr.lowrank import Site
from hpc_oialr.optim.core_lr import CoreLearningRate

# One such step may be a weight clipped in a step that a GradScaler skipped.
PATIENCE = 3


class ForeignSteps:
    """Compares who wrote into the trained weights and cores with who has stepped.

    An optimizer made anew in the middle of a run, or one for each parameter in backward hooks, trains with the
    rates of dense weights, and keeps the old parameters when shapes change.

    Parameters
    ----------
    core_lr
        Counts the steps of the optimizer given to the controller.
    engine
        Nothing is compared where it steps an optimizer of its own.
    """

    def __init__(self, core_lr: CoreLearningRate, engine: Engine) -> None:
        self._core_lr, self._off = core_lr, engine.steps_itself
        self._steps = core_lr.steps
        self._versions: dict[int, int] = {}
        self._foreign = 0

    def __getstate__(self) -> dict[str, object]:
        # Identities and versions are of this process's objects.
        return {**vars(self), "_versions": {}}

    def check(self, sites: Iterable[Site]) -> None:
        """Raise :class:`ModelError` after :data:`PATIENCE` calls in a row before which only others have stepped."""
        if self._off:
            return
        versions = _versions(sites)
        written = any(self._versions.get(key, version) != version for key, version in versions.items())
        if self._core_lr.steps != self._steps:
            self._foreign = 0
        elif written:
            self._foreign += 1
        if self._foreign >= PATIENCE:
            raise ModelError(
                f"the weights were changed {PATIENCE} times while the optimizer given to OIALR(...) did not step: "
                "another optimizer trains them (one made anew, or one in backward hooks), which would go on with dense "
                "weights and rates. Step the given optimizer, or make a new OIALR(...) with the one that is stepped."
            )
        self._steps, self._versions = self._core_lr.steps, versions

    def remember(self, sites: Iterable[Site]) -> None:
        """To be called when the method itself has written."""
        self._versions = _versions(sites)


def _versions(sites: Iterable[Site]) -> dict[int, int]:
    """How often each weight or core has been written; a weight that its user took away is left out."""
    found: dict[int, int] = {}
    for site in sites:
        holder = site.holder
        name = site.parameter if holder is site.owner else "weight"
        parameter = holder._parameters.get("S" if site.low_rank is not None else name)
        if isinstance(parameter, nn.Parameter):
            found[id(parameter)] = parameter._version
    return found
