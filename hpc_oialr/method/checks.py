"""Do model and optimizer fit, before any work is done."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpc_oialr.engines import Engine
from hpc_oialr.errors import ModelError, NonFiniteError
from hpc_oialr.lowrank import Site


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise :class:`ModelError` unless the optimizer holds parameters of the model, on their device."""
    names = {id(p): name for name, p in model.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = [p for p in held if id(p) not in names]
    if foreign:
        raise ModelError(
            f"the optimizer holds {len(foreign)} of {len(held)} parameters that are not the model's, the first of "
            f"shape {tuple(foreign[0].shape)} on {foreign[0].device}; it was made for another model, or before this one "
            "was copied, moved or wrapped. Make it from model.parameters() after the model is in its final place."
        )
    for p in held:
        _check_state_device(names[id(p)], p, optimizer)


def _check_state_device(name: str, p: nn.Parameter, optimizer: Optimizer) -> None:
    for key, value in optimizer.state.get(p, {}).items():
        if isinstance(value, Tensor) and value.dim() > 0 and value.device != p.device:
            raise ModelError(
                f"the optimizer's state {key!r} of {name} is on {value.device}, the parameter on {p.device}: the "
                "optimizer was made before the model was moved. Move the model first, then make the optimizer."
            )


def trained_sites(sites: Sequence[Site], optimizer: Optimizer) -> list[Site]:
    """The sites whose weight the optimizer trains; the others stay dense."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [site for site in sites if id(site.weight) in held]


def require_finite(sites: Sequence[Site], engine: Engine) -> None:
    """Raise :class:`NonFiniteError`, naming the layers, on every process before anything is changed.

    One read-back; where parameters are split, one all-reduce of a number a layer.
    """
    if not sites:
        return
    bad_values = torch.stack([(~torch.isfinite(engine.stored(site.trained))).any() for site in sites])
    found = engine.seen_by_any(bad_values.float()).tolist()
    bad = [site.name for site, count in zip(sites, found, strict=True) if count]
    if bad:
        raise NonFiniteError(
            f"NaN or Inf in the weight of {', '.join(bad[:5])}{' and others' if len(bad) > 5 else ''}; an SVD needs "
            "finite values. Lower the learning rate, clip gradients, or resume from an earlier checkpoint."
        )
