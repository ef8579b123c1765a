"""What of a pretrained model is trained, as typed settings."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from torch import nn

from hpc_oialr.errors import ConfigError, ModelError
from hpc_oialr.finetune.layers import AdaptedLinear, MoSaraLinear, SaraLinear
from hpc_oialr.linalg.svd import SVD, svd
from hpc_oialr.lowrank.selection import Selection, select
from hpc_oialr.lowrank.targets import TargetWeight
from hpc_oialr.method.rules import CumulativeSum

log = logging.getLogger(__name__)


class FineTuning(ABC):
    """Settings of one way to fine-tune."""

    @abstractmethod
    def apply(self, model: nn.Module, head: Collection[str] = ()) -> None:
        """Change ``model`` in place, before its optimizer is made; modules named ``head`` are trained as they are."""


@dataclass(kw_only=True)
class Full(FineTuning):
    """All parameters are trained."""

    def apply(self, model: nn.Module, head: Collection[str] = ()) -> None:
        """Nothing to do."""


@dataclass(kw_only=True)
class HeadOnly(FineTuning):
    """The pretrained part is frozen."""

    def apply(self, model: nn.Module, head: Collection[str] = ()) -> None:
        """Freeze all but the head."""
        train_only(model, head)


@dataclass(kw_only=True)
class SARA(FineTuning):
    """``W + A diag(lambda) B`` with r of each layer from W's singular values. arXiv 2408.03290.

    Parameters
    ----------
    threshold
        r is the smallest number of leading singular values whose sum reaches this share of the sum of all.
    selection
        Which layers; all other parameters but the head's are frozen.
    """

    threshold: float = 0.01
    selection: Selection = field(default_factory=lambda: Selection(kinds=("Linear",)))

    def __post_init__(self) -> None:
        CumulativeSum(self.threshold)

    def apply(self, model: nn.Module, head: Collection[str] = ()) -> None:
        """Replace the selected layers by :class:`SaraLinear`."""
        _replace(model, head, self.selection, self.threshold, lambda layer, found: SaraLinear(layer, len(found.s)))


@dataclass(kw_only=True)
class MoSARA(FineTuning):
    """Frozen leading singular bases of W, and sets of singular values among which a router mixes. arXiv 2408.03290.

    Parameters
    ----------
    threshold
        As in :class:`SARA`; chooses how many leading directions there are.
    experts
        Sets of singular values.
    selection
        Which layers; all other parameters but the head's are frozen.
    """

    threshold: float = 0.5
    experts: int = 5
    selection: Selection = field(default_factory=lambda: Selection(kinds=("Linear",)))

    def __post_init__(self) -> None:
        CumulativeSum(self.threshold)
        if self.experts < 1:
            raise ConfigError("experts", self.experts, "must be at least 1")

    def apply(self, model: nn.Module, head: Collection[str] = ()) -> None:
        """Replace the selected layers by :class:`MoSaraLinear`."""
        experts = self.experts
        _replace(model, head, self.selection, self.threshold, lambda layer, found: MoSaraLinear(layer, found, experts))


def train_only(model: nn.Module, head: Collection[str]) -> None:
    """Freeze every parameter outside of the modules named ``head``."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_inside(name, head))


def adaptable(model: nn.Module, selection: Selection, head: Collection[str] = ()) -> list[TargetWeight]:
    """The linear layers outside of the head that an adapter can take the place of, as OIALR would select them.

    ModelError if there is none.
    """
    # These read their layers' weights without calling them.
    reading = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
    readers = tuple(name and f"{name}." for name, module in model.named_modules() if isinstance(module, reading))
    targets = select(model, selection, frozen=True)
    found = [
        target
        for target in targets
        if type(target.owner) is nn.Linear and not _inside(target.name, head) and not target.name.startswith(readers)
    ]
    if left := sorted({target.name for target in targets} - {target.name for target in found}):
        log.info("not adapted: %s (the head, or no nn.Linear that is called)", ", ".join(left))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no linear layer that SARA or Mo-SARA could adapt: all are left out by the "
            "selection, part of the head, or inside PyTorch's own attention, which reads weights without calling layers."
        )
    return found


def _replace(
    model: nn.Module,
    head: Collection[str],
    selection: Selection,
    threshold: float,
    make: Callable[[nn.Linear, SVD], AdaptedLinear],
) -> None:
    layers = {target.name: target.owner for target in adaptable(model, selection, head)}
    train_only(model, head)
    rule = CumulativeSum(threshold)
    for name, layer in layers.items():
        assert isinstance(layer, nn.Linear)
        found = svd(layer.weight, name=name)
        adapted = make(layer, found.leading(rule.choose(found.s.cpu(), *layer.weight.shape)))
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, adapted)


def _inside(name: str, modules: Collection[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)
