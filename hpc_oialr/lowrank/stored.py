"""The structure of a state dict (r of each layer, or dense), and how a model takes it on before loading."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hpc_oialr.errors import ModelError
from hpc_oialr.lowrank.attachment import attached, controller_of
from hpc_oialr.lowrank.attention import FactorisedMultiheadAttention, repack, unpack
from hpc_oialr.lowrank.base import LowRankWeight
from hpc_oialr.lowrank.conversion import empty_factors, leave_fused_inference, low_rank_layers
from hpc_oialr.lowrank.kernel_modes import Inner, is_tucker
from hpc_oialr.lowrank.targets import TargetWeight, every_weight


class Stored(NamedTuple):
    """The bases of one layer in a state dict; None if it is dense there."""

    U: Tensor | None
    Vh: Tensor | None
    tucker: bool = False

    @property
    def inner(self) -> Inner | None:
        """Inner dimension, of a Tucker layer both; None: dense."""
        if self.U is None or self.Vh is None:
            return None
        r = int(self.U.shape[1])
        return (r, int(self.Vh.shape[0])) if self.tucker else r


def stored_layers(
    targets: Sequence[TargetWeight], module: nn.Module, root: nn.Module, state: Mapping[str, Any], prefix: str
) -> dict[str, Stored]:
    """The layers of ``targets`` that are in a state dict, which is about to be loaded into ``module``.

    ``module`` is a part of ``root`` or all of it, and its names in ``state`` begin with ``prefix``. Raises
    :class:`ModelError` if a layer is there twice, dense and low-rank, or of another shape.
    """
    found = {}
    for target in targets:
        names = _names(target, module, root, prefix)
        if names is None:
            continue
        path, packed = names
        dense = [key for key in (path + "weight", packed) if key in state]
        factors = [state.get(path + name) for name in ("U", "S", "Vh")]
        held = [factor for factor in factors if isinstance(factor, Tensor)]
        if dense and held:
            raise ModelError(
                f"the state dict holds layer {target.name} twice: {dense[0]} and {path}S. set_model_state_dict with "
                "full_state_dict adds what a state of another structure lacks: call oialr.load_state_dict(...) first, "
                "which gives the model the stored structure."
            )
        if len(held) == 3:
            U, S, Vh = held
            (m, n), places = target.shape, max(1, S.shape[1] // max(1, Vh.shape[0]))
            fits = len(U) == m and Vh.shape[1] * places == n and S.shape == (U.shape[1], Vh.shape[0] * places)
            if not fits or (places > 1 and Vh.shape[1] != target.dense_shape[1]):
                raise ModelError(
                    f"the state dict's layer {target.name} is {U.shape[0]} x {Vh.shape[1]} with a core of "
                    f"{tuple(S.shape)}; here it is {target.shape[0]} x {target.shape[1]}. It belongs to another model."
                )
            found[target.name] = Stored(U, Vh, is_tucker(S, Vh))
        elif dense:
            found[target.name] = Stored(None, None)
    return found


def _names(target: TargetWeight, module: nn.Module, root: nn.Module, prefix: str) -> tuple[str, str] | None:
    """How the layer's names begin in a state dict of ``module``, and the whole name of a weight in its owner."""
    layer = target.name.split(".") if target.name else []
    inside = layer[-1:] if target.kind == "MultiheadAttention" else []
    if module is root:
        prefix += "".join(f"{part}." for part in layer[: len(layer) - len(inside)])
    elif module is not target.owner:
        return (prefix, prefix + "weight") if module is target.holder else None
    return prefix + "".join(f"{part}." for part in inside), prefix + target.parameter


def match_attention(
    targets: Iterable[TargetWeight], state: Mapping[str, Any], prefix: str, module: nn.Module, root: nn.Module
) -> list[TargetWeight]:
    """Pack or unpack the dense projections of attentions, as the names in a state dict say; the targets concerned."""
    concerned = []
    for target in targets:
        names = _names(target, module, root, prefix)
        if target.kind != "MultiheadAttention" or names is None or module is target.holder:
            continue
        path, packed = names
        if packed in state:
            pack(target)
        elif path + "weight" in state:
            unpack(target.owner)  # type: ignore[arg-type]
        else:
            continue
        concerned.append(target)
    return concerned


def pack(target: TargetWeight) -> None:
    """Give an attention its own class back, once none of its projections is low-rank."""
    attention = target.owner
    if isinstance(attention, FactorisedMultiheadAttention):
        projections = [m for name, m in attention.named_children() if name != "out_proj"]
        if not any(isinstance(m, LowRankWeight) for m in projections):
            repack(attention)


def match_structure(model: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Give the layers of ``model`` the structure of a state dict, which ``load_state_dict`` fills with values then.

    For a model without a controller, before its optimizer is made: in a new process that loads a low-rank model first
    and calls ``OIALR(...)`` later, or to use a trained model. With a controller ``load_state_dict`` does it by itself.

    Parameters
    ----------
    model
        Dense, low-rank, or some of each, and not yet wrapped or sharded.
    state
        As ``model.state_dict()`` of the model that was saved. Layers that it does not hold stay as they are.

    Returns
    -------
    list
        Names of the layers that changed; their values are gone.

    Raises
    ------
    ModelError
        If the state is of another model, or a wrapper around ``model`` would keep the old parameters.
    """
    before = {name: layer.inner for name, layer in low_rank_layers(model).items()}
    for name, module, controller in attached(model):
        controller.before_load(module, dict(state), f"{name}." if name else "", assign=False)
    targets = [target for target in every_weight(model) if controller_of(target.owner) is None]
    stored = stored_layers(targets, model, model, state, "")
    _require_known(model, state)
    changes = [
        (target, form)
        for target in targets
        if (form := stored.get(target.name)) and form.inner != (target.low_rank and target.low_rank.inner)
    ]
    if changes:
        _require_unwrapped(model, [target for target, _ in changes])
        leave_fused_inference(model)
    for target, form in changes:
        if target.low_rank is not None:
            target.low_rank.become_dense()
        if form.U is not None and form.inner is not None:
            empty_factors(target, form.inner, factor_dtype=form.U.dtype)
    match_attention(targets, state, "", model, model)
    after = {target.name: target.low_rank and target.low_rank.inner for target in every_weight(model)}
    return [name for name, r in after.items() if before.get(name) != r]


def _require_known(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise :class:`ModelError` if the state holds a low-rank layer that the model does not have."""
    known = {f"{target.name}." if target.name else "" for target in every_weight(model)}
    known |= {name.removesuffix("S") for name in model.state_dict()}
    for key in state:
        path = key.removesuffix("S")
        if f"{path}S" == key and path not in known and {f"{path}U", f"{path}Vh"} <= state.keys():
            raise ModelError(
                f"the state dict holds a low-rank layer {path[:-1]!r} that this model does not have; it belongs to "
                "another model, or its names begin otherwise here (a wrapper's 'module.', say)."
            )


def _require_unwrapped(model: nn.Module, targets: Iterable[TargetWeight]) -> None:
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ModelError(
            "match_structure replaces parameters, of which a DistributedDataParallel would keep the old ones: call it "
            "for the model before it is wrapped; or call OIALR(...) first, and load_state_dict does it."
        )
    if any(isinstance(target.trained, DTensor) for target in targets):
        raise ModelError(
            "match_structure cannot change layers that are split over ranks. Call it before the model is sharded; or "
            "make a dense model, then OIALR(...), oialr.load_state_dict(...), and load the model's state."
        )
