"""Loads states of another structure: layers are given the stored r, or become dense again, before values are loaded.

The stored structure wins: the outputs are then those of the model that was saved, which projecting a dense weight onto
other bases could not give. The controller's counters are not part of the model, and are loaded with its own state only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from hpc_oialr.errors import ModelError
from hpc_oialr.lowrank import TargetWeight, low_rank_layers
from hpc_oialr.lowrank.attachment import Attachment, untie
from hpc_oialr.lowrank.attention import FactorisedMultiheadAttention, unpack
from hpc_oialr.lowrank.base import whole_shape
from hpc_oialr.lowrank.kernel_modes import Inner, as_inner
from hpc_oialr.lowrank.stored import Stored, match_attention, pack, stored_layers
from hpc_oialr.lowrank.targets import plain_name
from hpc_oialr.method.basis import Bases, BasisUpdater, turned
from hpc_oialr.method.engine import Engine
from hpc_oialr.optim.state_kinds import FACTORED

T = TypeVar("T")

ORDER = "load the model's state (or call oialr.load_state_dict) first, then the optimizer's"


class Loader:
    """Gives the layers of one controller the structure of what is loaded into them."""

    def __init__(
        self,
        root: nn.Module,
        targets: Sequence[TargetWeight],
        basis: BasisUpdater,
        engine: Engine,
        *,
        empty: Sequence[TargetWeight],
    ) -> None:
        self._root, self.targets, self._basis, self._engine = root, targets, basis, engine
        self.empty = {target.name for target in empty}  # layers whose values are yet to be loaded
        self.optimizer_loaded = False  # since the last step
        self.guards = [AverageGuard(root, *average) for average in basis.averages]

    def own_names(self, named: Mapping[str, T]) -> dict[str, T]:
        """Names of layers, or of what belongs to one, as the layers are called here: compiled or not."""
        own = {plain_name(target.name): target.name for target in self.targets}

        def translate(name: str) -> str:
            layer = name = plain_name(name)
            while layer and layer not in own:
                layer = layer.rpartition(".")[0]
            return own.get(layer, layer) + name.removeprefix(layer)

        return {translate(name): value for name, value in named.items()}

    def take(self, r: Mapping[str, Inner], bases_trained: Sequence[str]) -> list[str]:
        """Give every layer its r, or make it dense if ``r`` lacks it; returns the names of the layers changed.

        The bases of those in ``bases_trained`` are trained in the stored phase.
        """
        frees_bases = self._basis.config.frees_bases
        if bases_trained and not frees_bases:
            raise ModelError(
                f"U and Vh of {bases_trained[0]} are trained in the checkpoint's phase, never by these settings. Set "
                "train or bases_trained as they were."
            )
        if missing := set(r) - {target.name for target in self.targets}:
            raise ModelError(
                f"the checkpoint has a low-rank layer {min(missing)!r} that this model and selection do not have; "
                "it belongs to another model or to another oialr.selection."
            )
        wanted = {target.name: as_inner(r[target.name]) if target.name in r else None for target in self.targets}
        with self._engine.changing(self._root):
            changed = self._restructure(wanted)
        for target in self.targets:
            if frees_bases and target.low_rank is not None:
                target.low_rank.train_bases(target.name in bases_trained)
        self.empty |= set(changed) & set(r)
        return changed

    def before_load(self, module: nn.Module, state: Mapping[str, Any], prefix: str, *, assign: bool) -> list[str]:
        """Give layers the structure that they have in ``state``; returns the names of the layers changed.

        ``state`` is about to be loaded into ``module``, whose names in it begin with ``prefix``.
        """
        if assign:
            raise ModelError(
                "load_state_dict(assign=True) replaces every parameter, of which the optimizer and OIALR hold the old "
                "ones; load without assign."
            )
        stored = stored_layers(self.targets, module, self._root, state, prefix)
        with self._engine.changing(self._root):
            changed = self._restructure(stored)
            for target in match_attention(self.targets, state, prefix, module, self._root):
                for twin in self._basis.twins(target):
                    if isinstance(target.owner, FactorisedMultiheadAttention):
                        unpack(cast(Any, twin.owner))
                    else:
                        pack(twin)
        self.empty -= stored.keys()
        return changed

    def _restructure(self, wanted: Mapping[str, Stored | Inner | None]) -> list[str]:
        """Change layers that are not as wanted: a stored form, or r or None (dense) if values are loaded later."""
        whole = self._engine.whole_factors
        turn = whole and not self.optimizer_loaded
        changes: list[tuple[TargetWeight, Inner | None, Bases | None]] = []
        reshaped: list[str] = []
        for target in (target for target in self.targets if target.name in wanted):
            form, layer = wanted[target.name], target.low_rank
            stored = form if isinstance(form, Stored) else Stored(None, None)
            r = form.inner if isinstance(form, Stored) else form
            bases = None if stored.U is None or stored.Vh is None else (stored.U, stored.Vh)
            other_r = r != (None if layer is None else layer.inner)
            # In other bases of the same r only the moments change.
            if other_r or (turn and layer is not None and bases is not None and turned(layer, stored)):
                changes.append((target, r, bases))
            if other_r:
                reshaped.append(target.name)
        if reshaped and self.optimizer_loaded:
            raise ModelError(
                f"layer {reshaped[0]} changes its structure after the optimizer's state was loaded, which belongs to "
                f"one structure only: {ORDER}."
            )
        fresh = all(target.low_rank is None and bases is None for target, _, bases in changes)
        if reshaped and not (whole or fresh):
            raise ModelError(
                f"layer {reshaped[0]} is stored with another r, which {type(self._engine).__name__} cannot take on in "
                "a model that is in use: make a fresh, dense model, call oialr.load_state_dict, then load the model's "
                "state."
            )
        for target, r, bases in changes:
            self._basis.restructure(target, r, bases)
        if reshaped:
            self._basis.order(self.targets)
        return reshaped

    def after_optimizer_load(self, optimizer: Optimizer) -> None:
        """Raise :class:`ModelError` if the loaded state has another structure than a layer."""
        # Accelerate's prepare() loads an optimizer's state into itself, with nothing in it yet.
        self.optimizer_loaded |= any(optimizer.state.get(target.trained) for target in self.targets)
        for target in self.targets:
            shape = whole_shape(target.trained)
            for key, value in (optimizer.state.get(target.trained) or {}).items():
                if isinstance(value, Tensor) and value.dim() >= 2 and not _has_shape(key, value, shape):
                    form = "dense" if target.low_rank is None else f"of r = {target.low_rank.inner}"
                    raise ModelError(
                        f"the optimizer's state {key!r} of layer {target.name} has shape {tuple(value.shape)}, but "
                        f"the layer is {form} here ({tuple(shape)}): {ORDER}."
                    )

    def check_values(self) -> None:
        """Raise :class:`ModelError` if a layer that is about to be used has no values yet."""
        if self.empty and self._engine.whole_factors:
            layers = low_rank_layers(self._root)
            require_values({name: layer.U for name, layer in layers.items() if name in self.empty})
            self.empty.clear()


class AverageGuard:
    """Refuses to load a state of another structure or other bases into a running average.

    ``targets`` are the layers of ``average`` that are transformed with those of ``model``, by name.
    """

    def __init__(self, model: nn.Module, average: nn.Module, targets: Mapping[str, TargetWeight]) -> None:
        self._model, self._average, self._targets = model, average, targets

    def __repr__(self) -> str:
        """For the message that refuses a controller of its own."""
        return "another model, of which it is a running average"

    def tie(self) -> None:
        """Hook ``load_state_dict`` of the average and of its layers."""
        untie(self._average)
        attachment = Attachment(cast(Any, self))
        holders = [module for target in self._targets.values() for module in (target.owner, target.holder)]
        for module in {id(m): m for m in (self._average, *holders)}.values():
            attachment.cover(module)

    def before_load(self, module: nn.Module, state: Mapping[str, Any], prefix: str, *, assign: bool) -> None:
        """Raise :class:`ModelError` unless the state is in the bases that the model has now."""
        layers = {plain_name(name): layer for name, layer in low_rank_layers(self._model).items()}
        stored = stored_layers(list(self._targets.values()), module, self._average, state, prefix)
        for name, form in stored.items():
            layer = layers.get(plain_name(name))
            if form.inner != (None if layer is None else layer.inner) or (layer and turned(layer, form)):
                raise ModelError(
                    f"the state of a running average holds layer {name} in another r or other bases than the model has. "
                    "Load the model's state of the same checkpoint first, then the average's; or call "
                    "oialr.detach() if training has ended."
                )


def require_values(bases: Mapping[str, Tensor]) -> None:
    """Raise :class:`ModelError` if a basis is still empty."""
    if empty := [name for name, U in bases.items() if not bool(U.any())]:
        raise ModelError(
            f"layer {empty[0]} has no values: oialr.load_state_dict has only given it its r. Load the model's state of "
            "the same checkpoint before the next forward pass: model.load_state_dict(...)."
        )


def require_same_groups(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Raise :class:`ModelError` if the stored groups have the same total of parameters, distributed differently."""
    here = [len(group["params"]) for group in optimizer.param_groups]
    there = [len(group["params"]) for group in state["param_groups"]]
    if here != there and len(here) == len(there) and sum(here) == sum(there):
        raise ModelError(
            f"the optimizer's groups hold {here} parameters, those of the state {there}: cores and dense weights are in "
            f"groups of their own. {ORDER[0].upper()}{ORDER[1:]}."
        )


def _has_shape(key: str, value: Tensor, shape: Sequence[int]) -> bool:
    """Whether state fits a parameter's shape; means over rows or columns have an axis of length 1."""
    if key in FACTORED.keys() | FACTORED.values():
        return value.dim() != len(shape) or all(a in (1, b) for a, b in zip(value.shape, shape, strict=True))
    return tuple(value.shape) == tuple(shape)
