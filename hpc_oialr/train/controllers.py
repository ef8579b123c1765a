"""With the method or without it: one interface for the loop."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hpc_oialr.engines import Engine
from hpc_oialr.errors import ModelError
from hpc_oialr.lowrank import Selection, select
from hpc_oialr.method.checks import trained_targets
from hpc_oialr.method.oialr import OIALR
from hpc_oialr.method.report import UpdateReport
from hpc_oialr.method.stability_tracker import StabilityTracker
from hpc_oialr.optim.stack import OptimizerStack


class Dense:
    """Ordinary training behind the face of :class:`hpc_oialr.OIALR`.

    Parameters
    ----------
    frequency
        Measure how far the layers' bases have settled each so many steps; None = not.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, engine: Engine, *, frequency: int | None = None
    ) -> None:
        self.module, self.engine, self.t, self.frequency = model, engine, 0, frequency
        self.targets = (
            trained_targets(select(model, Selection()), OptimizerStack(optimizer)) if frequency else []
        )
        self._watch = StabilityTracker(self.targets, engine, threshold=None)
        self._model = engine.wrap(model, optimizer)

    @property
    def model(self) -> nn.Module:
        """What to call in the loop."""
        return self._model

    @property
    def r(self) -> dict[str, int]:
        """No layer is low-rank."""
        return {}

    @property
    def layers(self) -> list[str]:
        """Names of the layers that are measured, in the model's order."""
        return [target.name for target in self.targets]

    def no_sync(self) -> AbstractContextManager[None]:
        """Context in which gradients stay local."""
        return self.engine.no_sync(self._model)

    def step(self) -> UpdateReport | None:
        """Count, and measure when it is due."""
        self.t += 1
        due = self.targets and self.frequency is not None and self.t % self.frequency == 0
        return self._watch.report(self.targets, self.t) if due else None

    def rewrap(self) -> None:
        """A new wrapper, in the state that a resumed run begins with."""
        self._model = self.engine.rewrap(self.module)

    def state_dict(self) -> dict[str, Any]:
        """The method's state before its first update."""
        return {"t": self.t, "updates": 0, "r": {}, "streaks": {}}

    def tensor_state(self) -> dict[str, Tensor]:
        """The bases kept for the next measurement; a collective call."""
        return self._watch.bases(self.targets)

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        """Take back what :meth:`state_dict` gave.

        Raises
        ------
        ModelError
            If the state is that of a low-rank run.
        """
        if state["r"]:
            raise ModelError("the checkpoint is that of a low-rank run, but oialr is null here.")
        self.t = int(state["t"])
        self._watch.restore(tensors or {}, state["streaks"])


Controller = Dense | OIALR
