"""Which layers become low-rank: fit for a conversion, in the optimizer, and not frozen by the user."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from torch.distributed.tensor import DTensor

from hpc_oialr.errors import ModelError
from hpc_oialr.lowrank import Selection, TargetWeight
from hpc_oialr.lowrank.layout import Sharded
from hpc_oialr.lowrank.marks import accumulation_hooks, optimizer_in_hooks
from hpc_oialr.lowrank.selection import Refusal, examine, shared_weights, unfit
from hpc_oialr.method.engine import Engine
from hpc_oialr.optim.stack import OptimizerStack

log = logging.getLogger(__name__)


def find_participants(
    model: nn.Module, selection: Selection, optimizer: OptimizerStack, engine: Engine
) -> list[TargetWeight]:
    """The targets that are low-rank or will be, including those that are frozen at present.

    Warns of layers that stay dense although no setting says so; :class:`ModelError` if no layer is left.
    """
    found, refused = examine(model, selection, frozen=True, low_rank=True)
    held = {id(p) for p in optimizer.parameters()}
    targets: list[TargetWeight] = []
    ignored: list[str] = []
    for target in found:
        if id(target.trained) not in held:
            refused[target.name] = Refusal("its weight is not in the optimizer")
        elif id(target.trained) in engine.ignored:
            ignored.append(target.name)
        elif (refusal := _layout_refusal(target, engine)) is not None:
            refused[target.name] = refusal
        else:
            targets.append(target)
    if ignored:
        log.info("left dense: %s (DistributedDataParallel ignores their weights)", ", ".join(ignored))
    unforeseen = {name: refusal.reason for name, refusal in refused.items() if refusal.warn}
    if not targets and not unforeseen:
        some = "; ".join(f"{name or 'the model'} ({each.reason})" for name, each in list(refused.items())[:5])
        raise ModelError(
            f"no layer of the model can be converted: {some or 'it has none'}{', ...' if len(refused) > 5 else ''}. The "
            "log names the reason for each (level INFO)."
        )
    _warn_of_hooks(targets, optimizer)
    _warn_dense(unforeseen)
    return targets


def trained_targets(targets: Sequence[TargetWeight], optimizer: OptimizerStack) -> list[TargetWeight]:
    """The targets whose weight or core the optimizer trains."""
    held = {id(p) for p in optimizer.parameters()}
    return [target for target in targets if id(target.trained) in held]


def drop_unfit(model: nn.Module, targets: Sequence[TargetWeight], optimizer: OptimizerStack) -> set[str]:
    """Names of dense targets that the user has made unfit since OIALR(...), e.g. tied or given a gradient hook; warns.

    A weight that was removed is an error of :class:`~hpc_oialr.method.checks.DenseWeights`.
    """
    shared = shared_weights(model)
    reasons = {
        target.name: refusal.reason
        for target in targets
        if target.stored is not None and (refusal := unfit(target, shared, frozen=True)) is not None
    }
    _warn_dense(reasons)
    _warn_of_hooks([target for target in targets if target.name not in reasons], optimizer)
    return set(reasons)


class FrozenByUser:
    """Whether a user has frozen a weight or core, or ``requires_grad`` is only off at this moment.

    Loops that train two models in turn switch ``requires_grad`` off and on in every step. A parameter with
    ``requires_grad`` off is frozen if it was not written since the last step.
    """

    def __init__(self, targets: Iterable[TargetWeight]) -> None:
        self._versions: dict[str, tuple[int, int]] = {}
        self._waiting = {
            target.name for target in targets if target.low_rank is None and not target.weight.requires_grad
        }

    def __getstate__(self) -> dict[str, object]:
        # Ids and versions are those of this process's objects.
        return {**vars(self), "_versions": {}}

    def __call__(self, target: TargetWeight) -> bool:
        """Whether the weight or core of a target is frozen."""
        p = trained_parameter(target)
        if p is None or p.requires_grad:
            return False
        return self._versions.get(target.name) in (None, (id(p), p._version))

    def waits(self, target: TargetWeight) -> bool:
        """Whether a weight has been frozen since OIALR(...); it becomes low-rank once it is trained."""
        return target.name in self._waiting and self(target)

    def remember(self, targets: Iterable[TargetWeight]) -> None:
        """Call this at the end of every step."""
        targets = list(targets)
        self._waiting = {target.name for target in targets if self.waits(target)}
        self._versions = {
            target.name: (id(p), p._version)
            for target in targets
            if (p := trained_parameter(target)) is not None and not p.requires_grad
        }


def trained_parameter(target: TargetWeight) -> nn.Parameter | None:
    """The weight or core of a target; None if the user has removed it."""
    layer = target.low_rank
    return target.stored if layer is None else layer._parameters.get("S")


def _layout_refusal(target: TargetWeight, engine: Engine) -> Refusal | None:
    """Refuse a dense DTensor that is not sharded as the engine shards."""
    weight, layout = target.trained, engine.layout
    if target.low_rank is not None or not isinstance(weight, DTensor):
        return None
    if isinstance(layout, Sharded) and list(weight.placements) == list(layout.placements(0)):
        return None
    reason = f"its weight is a DTensor placed as {weight.placements}, which no engine has made"
    return Refusal(reason, warn=True)


def _warn_dense(reasons: Mapping[str, str]) -> None:
    if reasons:
        text = "; ".join(f"{name} ({reason})" for name, reason in reasons.items())
        warnings.warn(
            f"these layers stay dense: {text}. Undo that before the conversion, or name them in "
            "oialr.selection.exclude to say that it is meant so.",
            stacklevel=4,
        )


def _warn_of_hooks(targets: Iterable[TargetWeight], optimizer: OptimizerStack) -> None:
    """Warn of hooks that a core will not have, and of optimizers that step a weight in one of them.

    The latter are an error once they have left cores untrained: see ``other_optimizers.py``.
    """
    dense = (target for target in targets if target.low_rank is None)
    weights = {target.name: weight for target in dense if (weight := target.stored) is not None}
    for name, weight in weights.items():
        if (stepping := optimizer_in_hooks(weight, optimizer.nodes)) is not None:
            warnings.warn(
                f"a hook on the weight of {name} steps a {type(stepping).__name__} of its own in the backward pass: it "
                "continues with the dense weight, and the core that takes its place will not be trained, which ends the "
                "run soon after the conversion. Remove the hooks and step one optimizer, made from model.parameters() "
                "and given to OIALR(...), after backward().",
                stacklevel=4,
            )
            return
    if hooked := [name for name, weight in weights.items() if accumulation_hooks(weight)]:
        warnings.warn(
            f"post-accumulate-grad hooks on the weights of {', '.join(hooked)} are not called any more once these "
            "layers are low-rank, since the weight is no parameter then. Register them on layer.S after the "
            "conversion; an optimizer that steps inside such hooks does not train the cores: use one optimizer, "
            "and pass it to OIALR.",
            stacklevel=4,
        )
