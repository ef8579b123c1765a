"""A stored state of another structure: layers take the stored r, or become dense again, before values are loaded.

The structure of what is loaded wins, as the user asked for that model: its outputs are then those of the model that
was saved, which no projection of a dense weight onto other bases could give. The controller's own count is not
part of the model: it goes on from where it is, unless its state is loaded as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hpc_oialr.errors import ModelError
from hpc_oialr.lowrank import TargetWeight, low_rank_layers
from hpc_oialr.lowrank.attention import FactorisedMultiheadAttention, unpack
from hpc_oialr.lowrank.base import whole_shape
from hpc_oialr.lowrank.stored import Stored, match_attention, pack, stored_layers
from hpc_oialr.method.average_guard import turned
from hpc_oialr.method.basis import BasisUpdater
from hpc_oialr.method.engine import Engine
from hpc_oialr.optim.state_kinds import FACTORED

ORDER = "load the model's state (or call oialr.load_state_dict) first, then the optimizer's"


class Loader:
    """Keeps the layers of one controller in the structure of what is loaded into them.

    Attributes
    ----------
    targets
        The layers.
    empty
        Names of layers whose values are yet to be loaded.
    optimizer_loaded
        Whether the optimizer's state was loaded since the last step.
    """

    def __init__(
        self, root: nn.Module, targets: Sequence[TargetWeight], basis: BasisUpdater, engine: Engine
    ) -> None:
        self._root, self.targets, self._basis, self._engine = root, targets, basis, engine
        self.empty: set[str] = set()
        self.optimizer_loaded = False

    def take(self, r: Mapping[str, int]) -> list[str]:
        """Give every layer its r, or make it dense if it has none; names of the layers changed."""
        missing = set(r) - {target.name for target in self.targets}
        if missing:
            raise ModelError(
                f"the checkpoint has a low-rank layer {min(missing)!r} that this model and selection do not have; "
                "it belongs to another model or to another oialr.selection."
            )
        changed = self._restructure(
            {target.name: int(r[target.name]) if target.name in r else None for target in self.targets}
        )
        self.empty |= set(changed) & set(r)
        return changed

    def before_load(
        self, module: nn.Module, state: Mapping[str, Any], prefix: str, *, assign: bool
    ) -> list[str]:
        """Give the layers that ``state`` holds its structure; names of the layers changed.

        Parameters
        ----------
        module, prefix
            Into what it is loaded, and how the names of that begin in ``state``.
        assign
            Whether parameters are to be replaced.
        """
        if assign:
            raise ModelError(
                "load_state_dict(assign=True) replaces every parameter, of which the optimizer and OIALR hold the old "
                "ones; load without assign."
            )
        stored = stored_layers(self.targets, module, self._root, state, prefix)
        changed = self._restructure(stored)
        for target in match_attention(self.targets, state, prefix, module, self._root):
            for twin in self._basis.twins(target):
                match = unpack if isinstance(target.owner, FactorisedMultiheadAttention) else None
                pack(twin) if match is None else match(twin.owner)  # type: ignore[arg-type]
        self.empty -= stored.keys()
        return changed

    def _restructure(self, wanted: Mapping[str, Stored | int | None]) -> list[str]:
        changes = differences(
            self.targets, wanted, turn=self._engine.whole_factors and not self.optimizer_loaded
        )
        reshaped = [change.target.name for change in changes if change.reshaped]
        if reshaped:
            require_changeable(reshaped, changes, self._engine, optimizer_loaded=self.optimizer_loaded)
        apply_changes(self._basis, changes)
        if reshaped:
            self._basis.order(self.targets)
        return reshaped

    def after_optimizer_load(self, optimizer: Optimizer) -> None:
        """Remember it, and refuse state of another structure."""
        # Accelerate's prepare() loads an optimizer's state into itself, with nothing in it yet.
        self.optimizer_loaded |= any(optimizer.state.get(target.trained) for target in self.targets)
        require_same_shapes(self.targets, optimizer)

    def check_values(self) -> None:
        """Raise :class:`ModelError` if a layer that is about to be used has no values yet."""
        if self.empty and self._engine.whole_factors:
            layers = low_rank_layers(self._root)
            require_values({name: layer.U for name, layer in layers.items() if name in self.empty})
            self.empty.clear()


@dataclass(frozen=True)
class Change:
    """What is to be done to one layer.

    Attributes
    ----------
    r
        The new inner dimension; None: dense.
    U, Vh
        The bases that are to come, if they are known.
    reshaped
        Whether the trained parameter becomes another one; otherwise only the moments go over to other bases.
    """

    target: TargetWeight
    r: int | None
    U: Tensor | None
    Vh: Tensor | None
    reshaped: bool


def differences(
    targets: Sequence[TargetWeight], wanted: Mapping[str, Stored | int | None], *, turn: bool
) -> list[Change]:
    """Where layers are not as they are ``wanted``.

    Parameters
    ----------
    wanted
        For each layer its stored form; or only r, or None for dense: its values are yet to come then.
    turn
        Whether other bases of the same r count too.
    """
    changes = []
    for target in (target for target in targets if target.name in wanted):
        form, layer = wanted[target.name], target.low_rank
        stored = form if isinstance(form, Stored) else Stored(None, None)
        r = stored.r if isinstance(form, Stored) else form
        reshaped = r != (None if layer is None else layer.r)
        if reshaped or (turn and layer is not None and stored.U is not None and turned(layer, stored)):
            changes.append(Change(target, r, stored.U, stored.Vh, reshaped))
    return changes


def require_changeable(
    names: Sequence[str], changes: Sequence[Change], engine: Engine, *, optimizer_loaded: bool
) -> None:
    """Raise :class:`ModelError` unless these layers may take another structure now, with the call to make."""
    if optimizer_loaded:
        raise ModelError(
            f"layer {names[0]} changes its structure after the optimizer's state was loaded, which belongs to one "
            f"structure only: {ORDER}."
        )
    fresh = all(change.target.low_rank is None and change.U is None for change in changes)
    if not (engine.whole_factors or fresh):
        raise ModelError(
            f"layer {names[0]} is stored with another r, which {type(engine).__name__} cannot take on in a model that "
            "is in use: make a fresh, dense model, call oialr.load_state_dict, then load the model's state."
        )


def apply_changes(basis: BasisUpdater, changes: Sequence[Change]) -> None:
    """Give layers their new structure, with optimizer, averages and step sizes; their values are yet to be loaded."""
    for change in changes:
        if change.r is None:
            basis.restore(change.target)
        elif change.target.low_rank is None:
            basis.shell(change.target, change.r, change.U, change.Vh)
        else:
            basis.reshape(change.target, change.r, change.U, change.Vh)


def require_values(bases: Mapping[str, Tensor]) -> None:
    """Raise :class:`ModelError` if a basis is still empty."""
    empty = [name for name, U in bases.items() if not bool(U.any())]
    if empty:
        raise ModelError(
            f"layer {empty[0]} has no values: oialr.load_state_dict has only given it its r. Load the model's state of "
            "the same checkpoint before the next forward pass: model.load_state_dict(...)."
        )


def require_same_groups(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Raise :class:`ModelError` if the stored groups are of as many parameters, but dealt otherwise."""
    here = [len(group["params"]) for group in optimizer.param_groups]
    there = [len(group["params"]) for group in state["param_groups"]]
    if here != there and len(here) == len(there) and sum(here) == sum(there):
        raise ModelError(
            f"the optimizer's groups hold {here} parameters, those of the state {there}: cores and dense weights are in "
            f"groups of their own. {ORDER[0].upper()}{ORDER[1:]}."
        )


def require_same_shapes(targets: Sequence[TargetWeight], optimizer: Optimizer) -> None:
    """Raise :class:`ModelError` if the optimizer was given state of another structure than a layer has."""
    for target in targets:
        shape = whole_shape(target.trained)
        for key, value in (optimizer.state.get(target.trained) or {}).items():
            if isinstance(value, Tensor) and value.dim() >= 2 and not _has_shape(key, value, shape):
                form = "dense" if target.low_rank is None else f"of r = {target.low_rank.r}"
                raise ModelError(
                    f"the optimizer's state {key!r} of layer {target.name} has shape {tuple(value.shape)}, but the "
                    f"layer is {form} here ({tuple(shape)}): {ORDER}."
                )


def _has_shape(key: str, value: Tensor, shape: Sequence[int]) -> bool:
    """Whether state is of a parameter's shape; means over rows or columns have an axis of one."""
    if key in FACTORED.keys() | FACTORED.values():
        return value.dim() != len(shape) or all(a in (1, b) for a, b in zip(value.shape, shape, strict=True))
    return tuple(value.shape) == tuple(shape)
