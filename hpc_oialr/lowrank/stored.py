"""The structure a state dict is of, and models that take it: layers of the stored r, or dense ones."""

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
from hpc_oialr.lowrank.conversion import leave_fused_inference, low_rank_layers, make_shell
from hpc_oialr.lowrank.selection import Site, every_site


class Stored(NamedTuple):
    """What a state dict holds of one layer: its factors; or None of them, then it is dense."""

    U: Tensor | None
    Vh: Tensor | None

    @property
    def r(self) -> int | None:
        """Inner dimension; None: dense."""
        return None if self.U is None else int(self.U.shape[1])


def stored_layers(
    sites: Sequence[Site], module: nn.Module, root: nn.Module, state: Mapping[str, Any], prefix: str
) -> dict[str, Stored]:
    """The layers of ``sites`` that are in a state dict, which is about to be loaded into ``module``.

    Parameters
    ----------
    module, prefix
        Part of ``root`` or all of it, and how its names in ``state`` begin.

    Raises
    ------
    ModelError
        If a layer is there twice, dense and low-rank, or of another shape.
    """
    found = {}
    for site in sites:
        names = _names(site, module, root, prefix)
        if names is None:
            continue
        path, packed = names
        dense = [key for key in (path + "weight", packed) if key in state]
        factors = [state.get(path + name) for name in ("U", "S", "Vh")]
        held = [factor for factor in factors if isinstance(factor, Tensor)]
        if dense and held:
            raise ModelError(
                f"the state dict holds layer {site.name} twice: {dense[0]} and {path}S. set_model_state_dict with "
                "full_state_dict adds what a state of another structure lacks: call oialr.load_state_dict(...) first, "
                "which gives the model the stored structure."
            )
        if len(held) == 3:
            U, S, Vh = held
            if (U.shape[0], Vh.shape[1]) != site.shape or S.shape != (U.shape[1], Vh.shape[0]):
                raise ModelError(
                    f"the state dict's layer {site.name} is {U.shape[0]} x {Vh.shape[1]} with a core of "
                    f"{tuple(S.shape)}; here it is {site.shape[0]} x {site.shape[1]}. It belongs to another model."
                )
            found[site.name] = Stored(U, Vh)
        elif dense:
            found[site.name] = Stored(None, None)
    return found


def _names(site: Site, module: nn.Module, root: nn.Module, prefix: str) -> tuple[str, str] | None:
    """How the layer's names begin in a state dict of ``module``, and the whole name of a weight in its owner."""
    layer = site.name.split(".") if site.name else []
    inside = layer[-1:] if site.kind == "MultiheadAttention" else []
    if module is root:
        prefix += "".join(f"{part}." for part in layer[: len(layer) - len(inside)])
    elif module is not site.owner:
        return (prefix, prefix + "weight") if module is site.holder else None
    return prefix + "".join(f"{part}." for part in inside), prefix + site.parameter


def match_attention(
    sites: Iterable[Site], state: Mapping[str, Any], prefix: str, module: nn.Module, root: nn.Module
) -> list[Site]:
    """Pack or unpack the dense projections of attentions, as the names in a state dict say; the sites concerned."""
    concerned = []
    for site in sites:
        names = _names(site, module, root, prefix)
        if site.kind != "MultiheadAttention" or names is None or module is site.holder:
            continue
        path, packed = names
        if packed in state:
            pack(site)
        elif path + "weight" in state:
            unpack(site.owner)  # type: ignore[arg-type]
        else:
            continue
        concerned.append(site)
    return concerned


def pack(site: Site) -> None:
    """Give an attention its own class back, once none of its projections is low-rank."""
    attention = site.owner
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
    before = {name: layer.r for name, layer in low_rank_layers(model).items()}
    for name, module, controller in attached(model):
        controller.before_load(module, dict(state), f"{name}." if name else "", assign=False)
    sites = [site for site in every_site(model) if controller_of(site.owner) is None]
    stored = stored_layers(sites, model, model, state, "")
    _require_known(model, state)
    changes = [(site, stored[site.name]) for site in sites if site.name in stored]
    changes = [(site, form) for site, form in changes if form.r != (site.low_rank and site.low_rank.r)]
    if changes:
        _require_unwrapped(model, [site for site, _ in changes])
        leave_fused_inference(model)
    for site, form in changes:
        layer = site.low_rank
        if layer is not None:
            layer.become_dense()
        if form.U is not None and form.r is not None:
            make_shell(site, form.r, factor_dtype=form.U.dtype)
    match_attention(sites, state, "", model, model)
    return [
        site.name
        for site in every_site(model)
        if before.get(site.name) != (None if site.low_rank is None else site.low_rank.r)
    ]


def _require_known(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise :class:`ModelError` if the state holds a low-rank layer that the model does not have."""
    known = {f"{site.name}." if site.name else "" for site in every_site(model)} | {
        name.removesuffix("S") for name in model.state_dict()
    }
    for key in state:
        path = key.removesuffix("S")
        if f"{path}S" == key and path not in known and {f"{path}U", f"{path}Vh"} <= state.keys():
            raise ModelError(
                f"the state dict holds a low-rank layer {path[:-1]!r} that this model does not have; it belongs to "
                "another model, or its names begin otherwise here (a wrapper's 'module.', say)."
            )


def _require_unwrapped(model: nn.Module, sites: Iterable[Site]) -> None:
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ModelError(
            "match_structure replaces parameters, of which a DistributedDataParallel would keep the old ones: call it "
            "for the model before it is wrapped; or call OIALR(...) first, and load_state_dict does it."
        )
    if any(isinstance(site.trained, DTensor) for site in sites):
        raise ModelError(
            "match_structure cannot change layers that are split over processes. Call it before the model is sharded; or "
            "make a dense model, then OIALR(...), oialr.load_state_dict(...), and load the model's state."
        )
