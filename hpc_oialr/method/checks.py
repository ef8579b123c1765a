"""Checks before layers change: model and optimizer fit together, and values are finite."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from weakref import ReferenceType as Ref

import torch
from torch import Tensor, nn
from torch.optim import LBFGS

from hpc_oialr.errors import ConfigError, ModelError, NonFiniteError
from hpc_oialr.lowrank import TargetWeight, low_rank_layers
from hpc_oialr.lowrank.attachment import attached
from hpc_oialr.lowrank.tucker import takes_tucker
from hpc_oialr.method.config import OIALRConfig
from hpc_oialr.method.engine import Engine, require_not_torchft
from hpc_oialr.optim.core_lr import check_core_factor
from hpc_oialr.optim.stack import OptimizerStack
from hpc_oialr.optim.state import check_state
from hpc_oialr.optim.state_kinds import kinds_of

# Largest size of a parameter that is compared between ranks at every update.
_SMALL = 1 << 16


def require_unattached(model: nn.Module) -> None:
    """Raise :class:`ModelError` if another controller changes layers of this model."""
    for name, _, first in attached(model):
        raise ModelError(
            f"{name or 'the model'} belongs to {first!r} already; two controllers must not change the same "
            "layers. Use the first one, or call its detach() before making another."
        )


def require_one_process(engine: Engine) -> None:
    """Raise :class:`ModelError` where a controller cannot be copied or pickled."""
    if engine.world.size > 1:
        raise ModelError(
            f"a controller of {engine.world.size} processes cannot be copied or pickled, since a process group cannot; "
            "store state_dict() of controller, model and optimizer instead."
        )


def check_averages(averages: Sequence[nn.Module], model: nn.Module, engine: Engine) -> None:
    """Raise :class:`ModelError` if running averages are elsewhere than the model, or an engine splits matrices."""
    if averages and engine.layout.group is not None:
        raise ModelError(
            f"{len(averages)} running averages were given, but the engine splits each matrix over ranks; averages must "
            "be whole. Average the exported models, or use DistributedDataParallel."
        )
    here = {p.device for p in model.parameters()}
    if away := {p.device for average in averages for p in average.parameters()} - here:
        raise ModelError(
            f"a running average is on {next(iter(away))}, the model on {next(iter(here))}: averages are transformed with "
            "the bases of the model, where it is. Keep the average beside the model (timm's script: without "
            "--model-ema-force-cpu)."
        )


def check_optimizer(model: nn.Module, optimizer: OptimizerStack) -> None:
    """Raise :class:`ModelError` unless the optimizer holds parameters of the model, and its state is on their device."""
    for node in optimizer.nodes:
        require_not_torchft(node)
    names = {id(p): name for name, p in model.named_parameters()}
    held = optimizer.parameters()
    if foreign := [p for p in held if id(p) not in names]:
        raise ModelError(
            f"the optimizer holds {len(foreign)} of {len(held)} parameters that are not the model's, the first of "
            f"shape {tuple(foreign[0].shape)} on {foreign[0].device}; it was made for another model, or before this one "
            "was copied, moved or wrapped. Make it from model.parameters() after the model is in its final place."
        )
    for p in held:
        for key, value in [item for _, state in optimizer.states() for item in state.get(p, {}).items()]:
            if isinstance(value, Tensor) and value.dim() > 0 and value.device != p.device:
                raise ModelError(
                    f"the optimizer's state {key!r} of {names[id(p)]} is on {value.device}, the parameter on "
                    f"{p.device}: the optimizer was made before the model was moved. Move the model first, then make "
                    "the optimizer."
                )


class DenseWeights:
    """References to the dense weights that a controller was made with, to notice if one is replaced by another."""

    def __init__(self, targets: Sequence[TargetWeight]) -> None:
        self._references: dict[str, Ref[nn.Parameter]] = {}
        self.remember(targets, [target.name for target in targets])

    def remember(self, targets: Sequence[TargetWeight], names: Collection[str]) -> None:
        """Take the present weights of the dense layers of these names."""
        dense = (target for target in targets if target.low_rank is None and target.name in names)
        self._references |= {target.name: Ref(target.weight) for target in dense}

    def check(self, module: nn.Module, targets: Sequence[TargetWeight]) -> None:
        """Raise :class:`ModelError`, naming the layer, if a layer was replaced since the controller was made."""
        present = {id(m) for m in module.modules()}
        for target in targets:
            holder, layer = target.holder, target.low_rank
            names = ("U", "S", "Vh") if layer is not None else (target.weight_name,)
            reference = self._references.get(target.name)
            if id(target.owner) not in present:
                what = "is no longer part of the model: it was replaced or removed"
            elif any(holder._parameters.get(name) is None for name in names):
                what = f"has no parameter {names[-1]!r} any more: it was parametrized, pruned or removed"
            elif layer is None and reference is not None and reference() is not target.weight:
                what = "has another weight object than the one the optimizer was made with: it was replaced"
            else:
                continue
            raise ModelError(
                f"layer {target.name} {what} after OIALR(...). Change the model first, make the optimizer from its "
                "parameters, then OIALR(...); values may be changed in place at any time."
            )


def check_change(
    targets: Sequence[TargetWeight], optimizer: OptimizerStack, engine: Engine, core_lr_scale: float | str
) -> None:
    """Raise on every rank, before anything changes, unless the optimizer's state can be transformed with these layers.

    If the optimizer is partitioned over ranks, one all-reduce of a number.
    """
    error: ModelError | ConfigError | None = None
    try:
        for target in targets:
            check_core_factor(optimizer, target.trained, core_lr_scale)
        optimizer.check_lists({target.trained: target.name for target in targets})
        check_state(optimizer, [(target.name, target.trained) for target in targets])
    except (ModelError, ConfigError) as found:
        error = found
    if optimizer.partitioned:
        flag = torch.tensor([float(error is not None)], device=engine.world.device)
        if engine.world.all_reduce(flag, op="max").item() and error is None:
            error = ModelError("another rank found optimizer state that cannot follow the change; see its message.")
    if error is not None:
        raise error


def check_free_bases(
    config: OIALRConfig, optimizer: OptimizerStack, engine: Engine, averages: Sequence[nn.Module]
) -> None:
    """Raise :class:`ConfigError` where ``U`` and ``Vh``, if the settings train them, could not be trained right."""
    if not config.frees_bases:
        return
    keys = {key for _, states in optimizer.states() for state in states.values() for key in state}
    weights = [
        node
        for node in optimizer.nodes
        if isinstance(node, LBFGS) or any(optimizer.kind(node, key) == "weight" for key in {*keys, *kinds_of(node)})
    ]
    groups = [group for leaf in optimizer.leaves for group in leaf.param_groups]
    fix = 'Keep train="cores" and bases_trained empty, or '
    if not engine.whole_factors or engine.layout.group is not None:
        fix += "use one process or DistributedDataParallel."
        rule = f"{type(engine).__name__} shards factors or their optimizer's state, which frozen bases only allow"
    elif averages:
        rule, fix = "running averages follow frozen bases only", fix + "average the merged models."
    elif weights:
        rule = f"{type(weights[0]).__name__} keeps copies or a history of weights, which cannot follow changing bases"
        fix += "use hpc_oialr.muon_adamw(model, bases_lr=...), AdamW or SGD."
    elif optimizer.partitioned or len(groups) < len(optimizer.groups()):
        rule = "the optimizer is inside one with groups of its own, or partitioned over ranks"
        fix += "use the optimizer itself."
    elif any(group.get("cores") for group in groups) and not any(group.get("bases") for group in groups):
        rule = "the optimizer has a group for cores and none for bases"
        fix += "give a rate for them: muon_adamw(model, bases_lr=...), in a recipe optimizer.init_args.bases_lr."
    else:
        return
    name = "train" if config.train == "factors" else "bases_trained"
    raise ConfigError(name, getattr(config, name), f"U and Vh cannot be trained here: {rule}", fix=fix)


def check_tucker(targets: Sequence[TargetWeight], conv: str, engine: Engine) -> None:
    """Raise :class:`ConfigError` where an engine shards convolutions that are, or would be, in Tucker form."""
    if (engine.whole_factors and engine.layout.group is None) or not any(takes_tucker(each, conv) for each in targets):
        return
    rule = f"keeps factors whole on every rank, and {type(engine).__name__} shards them or their optimizer's state"
    fix = 'Set conv to "flattened", or use one process or DistributedDataParallel.'
    raise ConfigError("conv", "tucker", rule, fix=fix)


def require_finite(targets: Sequence[TargetWeight], engine: Engine) -> None:
    """Raise :class:`NonFiniteError`, naming the layers, on every rank before anything changes.

    One read-back; for sharded parameters one all-reduce of a number per parameter.
    """
    if not targets:
        return
    if meta := [target.name for target in targets if target.trained.is_meta]:
        raise ModelError(
            f"the weights of {', '.join(meta[:5])} are on the meta device and have no values. Materialise and initialise "
            "the model, make the optimizer from its parameters, then OIALR(...)."
        )

    changing: list[tuple[str, Tensor]] = []
    for target in targets:
        layer = target.low_rank
        parameters = layer.factors if layer is not None and layer.bases_trained else (target.trained,)
        changing += [(target.name, engine.local_shard(p)) for p in parameters]
    # An empty shard has no largest value.
    largest = torch._foreach_norm([p if p.numel() else p.new_zeros(1) for _, p in changing], math.inf)
    found = engine.any_rank((~torch.stack(largest).isfinite()).float()).int().cpu().tolist()
    if bad := list(dict.fromkeys(name for (name, _), is_bad in zip(changing, found, strict=True) if is_bad > 0)):
        raise NonFiniteError(
            f"NaN or Inf in the weight of {', '.join(bad[:5])}{' and others' if len(bad) > 5 else ''}; an SVD needs "
            "finite values. Lower the learning rate, clip gradients, or resume from an earlier checkpoint."
        )


def compared_parts(module: nn.Module, targets: Sequence[TargetWeight], engine: Engine) -> dict[str, list[Tensor]]:
    """What must have equal bits on all ranks after a change of ``targets``: their factors, and some other parameters.

    Of the latter all small ones, or else the smallest: they show at little cost whether gradients are still averaged.
    """
    layers = low_rank_layers(module)
    factors = {target.name: [engine.layout.local(p) for p in layers[target.name].factors] for target in targets}
    without = {id(p) for layer in layers.values() for p in layer.factors} | set(engine.ignored)
    plain = {name: p for name, p in module.named_parameters() if p.requires_grad and id(p) not in without}
    small = {name: p for name, p in plain.items() if p.numel() <= _SMALL}
    some = small or dict(sorted(plain.items(), key=lambda item: item[1].numel())[:1])
    return factors | {name: [engine.local_shard(p)] for name, p in some.items()}
