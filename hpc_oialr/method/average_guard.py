"""What may be loaded into a running average: it is stored in the bases of its model, and follows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from hpc_oialr.errors import ModelError
from hpc_oialr.lowrank import LowRankWeight, TargetWeight, low_rank_layers
from hpc_oialr.lowrank.attachment import Attachment, untie
from hpc_oialr.lowrank.stored import Stored, stored_layers


class AverageGuard:
    """Refuses a state of another structure or of other bases for one running average.

    Parameters
    ----------
    model, average
        The trained model, and the module that holds averages of its weights.
    targets
        The layers of ``average`` that follow those of ``model``, by name.
    """

    def __init__(self, model: nn.Module, average: nn.Module, targets: Mapping[str, TargetWeight]) -> None:
        self._model, self._average, self._targets = model, average, targets

    def __repr__(self) -> str:
        """For the message that refuses a controller of its own."""
        return "another model, of which it is a running average"

    def tie(self) -> None:
        """Watch what is loaded into the average, or into one of its layers."""
        untie(self._average)
        attachment = Attachment(cast(Any, self))
        holders = [module for target in self._targets.values() for module in (target.owner, target.holder)]
        for module in {id(m): m for m in (self._average, *holders)}.values():
            attachment.cover(module)

    def release(self) -> None:
        """Let any state be loaded."""
        untie(self._average)

    def before_load(self, module: nn.Module, state: Mapping[str, Any], prefix: str, *, assign: bool) -> None:
        """Raise :class:`ModelError` unless the state is in the bases that the model has now."""
        layers = low_rank_layers(self._model)
        stored = stored_layers(list(self._targets.values()), module, self._average, state, prefix)
        for name, form in stored.items():
            layer = layers.get(name)
            if form.r != (None if layer is None else layer.r) or (layer and turned(layer, form)):
                raise ModelError(
                    f"the state of a running average holds layer {name} in another r or other bases than the model has. "
                    "Load the model's state of the same checkpoint first, then the average's; or let go of both by "
                    "oialr.detach() if training has ended."
                )


def turned(layer: LowRankWeight, stored: Stored) -> bool:
    """Whether stored bases differ from a layer's, which has the same r."""
    pairs = ((layer.U, stored.U), (layer.Vh, stored.Vh))
    return any(new is not None and not torch.equal(old, new.to(old)) for old, new in pairs)
