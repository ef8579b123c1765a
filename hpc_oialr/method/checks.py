"""Do model and optimizer fit, before any work is done."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hpc_oialr.engines import Engine
from hpc_oialr.errors import ConfigError, ModelError, NonFiniteError
from hpc_oialr.lowrank import Site
from hpc_oialr.optim.core_lr import check_core_factor
from hpc_oialr.optim.stack import OptimizerStack
from hpc_oialr.optim.state import check_state


def check_optimizer(model: nn.Module, optimizer: OptimizerStack) -> None:
    """Raise :class:`ModelError` unless the optimizer holds parameters of the model, on their device."""
    names = {id(p): name for name, p in model.named_parameters()}
    held = optimizer.parameters()
    foreign = [p for p in held if id(p) not in names]
    if foreign:
        raise ModelError(
            f"the optimizer holds {len(foreign)} of {len(held)} parameters that are not the model's, the first of "
            f"shape {tuple(foreign[0].shape)} on {foreign[0].device}; it was made for another model, or before this one "
            "was copied, moved or wrapped. Make it from model.parameters() after the model is in its final place."
        )
    for p in held:
        _check_state_device(names[id(p)], p, optimizer)


def _check_state_device(name: str, p: nn.Parameter, optimizer: OptimizerStack) -> None:
    for key, value in [item for _, state in optimizer.states() for item in state.get(p, {}).items()]:
        if isinstance(value, Tensor) and value.dim() > 0 and value.device != p.device:
            raise ModelError(
                f"the optimizer's state {key!r} of {name} is on {value.device}, the parameter on {p.device}: the "
                "optimizer was made before the model was moved. Move the model first, then make the optimizer."
            )


def trained_sites(sites: Sequence[Site], optimizer: OptimizerStack) -> list[Site]:
    """The sites whose weight the optimizer trains; the others stay dense."""
    held = {id(p) for p in optimizer.parameters()}
    return [site for site in sites if id(site.weight) in held]


def check_change(
    sites: Sequence[Site], optimizer: OptimizerStack, engine: Engine, core_lr_scale: float | str
) -> None:
    """Raise, on every process alike, unless the optimizer can follow a change of these layers.

    Nothing has been changed then. Where each process has some of the state only, one all-reduce of a number.

    Raises
    ------
    ModelError
        For state of unknown meaning or form, and a weight or core that no optimizer holds.
    ConfigError
        For a ``core_lr_scale`` that does not fit the optimizer.
    """
    error: ModelError | ConfigError | None = None
    try:
        for site in sites:
            check_core_factor(optimizer, site.trained, core_lr_scale)
        optimizer.check_lists({site.trained: site.name for site in sites})
        check_state(optimizer, [(site.name, site.trained) for site in sites])
    except (ModelError, ConfigError) as found:
        error = found
    if optimizer.partitioned:
        flag = torch.tensor([float(error is not None)], device=engine.world.device)
        if engine.world.all_reduce(flag, op="max").item() and error is None:
            error = ModelError(
                "another process found optimizer state that cannot follow the change; see its message."
            )
    if error is not None:
        raise error


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
