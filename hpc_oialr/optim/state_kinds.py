"""What each tensor in an optimizer's state means, by optimizer and key, and which optimizers are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from torch.optim import Optimizer

from hpc_oialr.errors import ConfigError

Kind = Literal["gradient", "centred", "square", "magnitude", "step size", "weight", "reset"]
"""How a tensor of the weight's shape follows ``W = U S Vh``.

``gradient``
    Linear in the gradient, or a direction in weight space: moves exactly, ``U^T M Vh^T``.
``square``
    Of gradients: moves approximately, ``(U o U)^T V (Vh o Vh)^T``, entries taken as uncorrelated.
``centred``
    A mean square from which the optimizer subtracts the square of its ``grad_avg``: the variance moves as a
    square, the mean as a gradient, so that the difference stays positive.
``magnitude``, ``step size``
    Of entries, not squared: the root of what its square becomes. A step size is never set to zero.
``weight``
    A copy, average or anchor of the weight: moves as the weight does, and is never set to zero.
``reset``
    Set to zero at every change of basis.
"""

Kinds = Mapping[str, Kind]

# Keys whose meaning is the same in every optimizer that uses them.
COMMON_KEYS: dict[str, Kind] = {
    **dict.fromkeys(
        [
            "exp_avg",
            "momentum_buffer",
            "grad_avg",
            "exp_avg_slow",
            "exp_avg_diff",
            "neg_exp_avg",
            "previous_grad",
            "prev_grad",
            "last_grad",
            "neg_pre_grad",
            "slow_momentum",
            "base_momentum",
            "old_g",
            "e_w",
            "sharpness",
            "kahan_comp",
        ],
        "gradient",
    ),
    **dict.fromkeys(
        [
            "exp_avg_sq",
            "max_exp_avg_sq",
            "exp_avg_var",
            "max_exp_avg_var",
            "square_avg",
            "sum",
            "acc_delta",
            "grad_sum_sq",
        ],
        "square",
    ),
    "exp_inf": "magnitude",
    **dict.fromkeys(
        [
            "z",
            "ax",
            "x0",
            "slow_buffer",
            "slow_params",
            "slow_param",
            "slow_weights",
            "lookahead_slow_buff",
            "backup_params",
            "old_p",
            "master",
            "master_param",
            "master_params",
            "master_weight",
            "master_weights",
            "fp32_param",
        ],
        "weight",
    ),
}

# Second moments of rank one: means over rows by the key of means over columns. Their product over the mean stays of
# rank one in another basis.
FACTORED = {
    "row_var": "col_var",
    "exp_avg_sq_row": "exp_avg_sq_col",
    "exp_avg_res_row": "exp_avg_res_col",
}

# Copies of the weight that a wrapper keeps around the inner optimizer's step, whose own length is free.
KEPT_BY_WRAPPERS = frozenset(
    {"slow_params", "slow_param", "slow_weights", "lookahead_slow_buff", "backup_params", "old_p"}
)

_ADAM: Kinds = {"exp_avg": "gradient", "exp_avg_sq": "square", "max_exp_avg_sq": "square"}
_MOMENTUM: Kinds = {"momentum_buffer": "gradient"}
_LION: Kinds = {"exp_avg": "gradient"}
_BELIEF: Kinds = {"exp_avg": "gradient", "exp_avg_var": "square", "max_exp_avg_var": "square"}
_RMSPROP: Kinds = {"square_avg": "centred", "grad_avg": "gradient", "momentum_buffer": "gradient"}
_ADADELTA: Kinds = {"square_avg": "square", "acc_delta": "square"}
_ADAMAX: Kinds = {"exp_avg": "gradient", "exp_inf": "magnitude"}
_ADAN: Kinds = {
    **_ADAM, "exp_avg_diff": "gradient", "previous_grad": "gradient", "neg_pre_grad": "gradient"
}  # fmt: skip
_MARS: Kinds = {**_ADAM, "last_grad": "gradient"}
_MADGRAD: Kinds = {"grad_sum_sq": "square", "s": "gradient", "x0": "weight"}
_FREE: Kinds = {"z": "weight", "x": "weight", "y": "weight", "exp_avg_sq": "square"}
_ADAFACTOR: Kinds = {"exp_avg": "gradient"}
_MUON: Kinds = {**_ADAM, **_MOMENTUM}

# Package and class; a subclass has the meaning of its base, other keys are those of COMMON_KEYS.
OPTIMIZERS: dict[str, Kinds] = {
    "hpc_oialr.MuonAdamW": _MUON,
    "torch.ASGD": {"ax": "weight"},
    "torch.Adadelta": _ADADELTA,
    "torch.Adafactor": _ADAFACTOR,
    "torch.Adagrad": {"sum": "square"},
    "torch.Adam": _ADAM,
    "torch.AdamW": _ADAM,
    "torch.Adamax": _ADAMAX,
    "torch.LBFGS": {},
    "torch.Muon": _MOMENTUM,
    "torch.NAdam": _ADAM,
    "torch.RAdam": _ADAM,
    "torch.RMSprop": _RMSPROP,
    "torch.Rprop": {"prev": "gradient", "step_size": "step size"},
    "torch.SGD": _MOMENTUM,
    **dict.fromkeys(
        [
            f"schedulefree.{name}ScheduleFree{variant}"
            for name in ("AdamW", "RAdam", "SGD")
            for variant in ("", "Closure")
        ],
        _FREE,
    ),
    "schedulefree.AdamWScheduleFreePaper": _FREE,
    "schedulefree.AdamWScheduleFreeReference": _FREE,
    "schedulefree.SGDScheduleFreeReference": _FREE,
    "bitsandbytes.Optimizer1State": {"state1": "gradient"},
    "bitsandbytes.Optimizer2State": {"state1": "gradient", "state2": "square"},
    "transformers.Adafactor": _ADAFACTOR,
    "timm.AdaBelief": _BELIEF,
    "timm.AdamP": _ADAM,
    "timm.AdamWLegacy": _ADAM,
    "timm.Adan": _ADAN,
    "timm.Adopt": _ADAM,
    "timm.LaProp": _ADAM,
    "timm.Lamb": _ADAM,
    "timm.Lars": _MOMENTUM,
    "timm.Lion": _LION,
    "timm.MADGRAD": _MADGRAD,
    "timm.Mars": _MARS,
    "timm.Muon": _MUON,
    "timm.NAdamLegacy": _ADAM,
    "timm.NAdamW": _ADAM,
    "timm.RAdamLegacy": _ADAM,
    "timm.RMSpropTF": _RMSPROP,
    "timm.SGDP": {"momentum": "gradient"},
    "timm.SGDW": _MOMENTUM,
    "pytorch_optimizer.ADOPT": _ADAM,
    "pytorch_optimizer.AccSGD": {"momentum_buffer": "weight"},
    "pytorch_optimizer.AdEMAMix": {**_ADAM, "exp_avg_slow": "gradient"},
    "pytorch_optimizer.AdaBelief": _BELIEF,
    "pytorch_optimizer.AdaBound": _ADAM,
    "pytorch_optimizer.AdaDelta": _ADADELTA,
    "pytorch_optimizer.AdaFactor": _ADAFACTOR,
    "pytorch_optimizer.AdaMax": _ADAMAX,
    "pytorch_optimizer.AdaMod": {**_ADAM, "exp_avg_lr": "magnitude"},
    "pytorch_optimizer.AdaNorm": _BELIEF,
    "pytorch_optimizer.AdaPNM": {**_ADAM, "neg_exp_avg": "gradient"},
    "pytorch_optimizer.AdamP": _ADAM,
    "pytorch_optimizer.Adan": _ADAN,
    "pytorch_optimizer.CAME": _ADAFACTOR,
    "pytorch_optimizer.DiffGrad": {**_ADAM, "previous_grad": "gradient"},
    "pytorch_optimizer.FAdam": {"momentum": "gradient", "fim": "square"},
    "pytorch_optimizer.Grams": _ADAM,
    "pytorch_optimizer.GrokFastAdamW": {**_ADAM, "grok_exp_avg": "gradient"},
    "pytorch_optimizer.LARS": _MOMENTUM,
    "pytorch_optimizer.LaProp": _ADAM,
    "pytorch_optimizer.Lamb": _ADAM,
    "pytorch_optimizer.Lion": _LION,
    "pytorch_optimizer.MADGRAD": _MADGRAD,
    "pytorch_optimizer.MARS": _MARS,
    "pytorch_optimizer.NovoGrad": {"moments": "gradient"},
    "pytorch_optimizer.PAdam": _ADAM,
    "pytorch_optimizer.PNM": {"pos_momentum": "gradient", "neg_momentum": "gradient"},
    "pytorch_optimizer.QHAdam": _ADAM,
    "pytorch_optimizer.QHM": _MOMENTUM,
    "pytorch_optimizer.RAdam": _ADAM,
    "pytorch_optimizer.Ranger": {**_ADAM, "slow_buffer": "weight"},
    "pytorch_optimizer.SGDP": {"momentum": "gradient"},
    "pytorch_optimizer.SGDW": _MOMENTUM,
    "pytorch_optimizer.ScheduleFreeAdamW": _FREE,
    "pytorch_optimizer.ScheduleFreeRAdam": _FREE,
    "pytorch_optimizer.ScheduleFreeSGD": _FREE,
    "pytorch_optimizer.SignSGD": _MOMENTUM,
    "pytorch_optimizer.StableAdamW": _ADAM,
    "pytorch_optimizer.Tiger": _LION,
    "pytorch_optimizer.Yogi": _ADAM,
}

_FACTORED = "keeps sums over rows or columns in place of the matrix of second moments"
_SKETCHED = "keeps its moments in a basis or preconditioner of its own"
_QUANTISED = "keeps quantised state"
_RATIO = "estimates one step size from sums over all entries, which a change of variables alters"
_DUAL = "computes the weight anew from sums of gradients, entry by entry"
_BACKWARD = "steps inside the backward pass, on parameters that it remembers"

# By the name of the class, in whichever package, because such optimizers are copied from file to file.
REFUSED: dict[str, str] = {
    "timm.Adafactor": "keeps state of one form for small and of another for large matrices",
    **dict.fromkeys(
        ["AdafactorBigVision", "SM3", "Adalite", "EmoFact", "NorMuon"],
        _FACTORED,
    ),
    **dict.fromkeys(["AdamMini", "Adam_mini", "Amos", "Nero", "RACS", "NvNovoGrad"], _FACTORED),
    **dict.fromkeys(
        [
            "Shampoo",
            "ScalableShampoo",
            "DistributedShampoo",
            "SOAP",
            "Kron",
            "PSGD",
            "Alice",
            "Conda",
            "Fira",
            "APOLLO",
            "GaLore",
            "GaLoreAdamW",
            "GaLoreAdafactor",
            "GaLoreAdamW8bit",
            "DASH",
            "SPlus",
            "LoRARite",
            "DeMo",
            "SaRA",
            "SPAM",
            "KFAC",
        ],
        _SKETCHED,
    ),
    **dict.fromkeys(["FlashAdamW", "AdamW8bit", "Adam8bit", "AdamWFp8", "AdamW4bit"], _QUANTISED),
    **dict.fromkeys(
        ["Prodigy", "DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD"], _RATIO
    ),
    **dict.fromkeys(["FTRL", "Ftrl"], _DUAL),
    **dict.fromkeys(["LOMO", "AdaLOMO", "AdaLomo"], _BACKWARD),
    "AdaHessian": "keeps second derivatives of the dense weight",
    "Adahessian": "keeps second derivatives of the dense weight",
    "MSVAG": "subtracts a square of its first moment from its second, which a rotation may make negative",
    "SparseAdam": "takes sparse gradients, a core's are dense",
}
INSTEAD = "AdamW, SGD, torch.optim.Muon, hpc_oialr.muon_adamw and schedule-free AdamW work"

_registered: dict[type, Kinds] = {}


def register_optimizer_state(optimizer: type[Optimizer], kinds: Kinds) -> None:
    """Say what the tensors in an optimizer's state mean, before it is given to :class:`hpc_oialr.OIALR`.

    Parameters
    ----------
    optimizer
        The class; subclasses have the same meaning.
    kinds
        For each key of a tensor of the weight's shape one of ``"gradient"``, ``"square"``, ``"magnitude"``,
        ``"centred"``, ``"step size"``, ``"weight"`` or ``"reset"``, see :data:`Kind`.

    Raises
    ------
    ConfigError
        For another kind.

    Examples
    --------
    >>> import torch
    >>> class Signs(torch.optim.SGD): ...
    >>> register_optimizer_state(Signs, {"votes": "gradient"})
    """
    for key, kind in kinds.items():
        if kind not in get_args(Kind):
            raise ConfigError(
                f"the kind of {key!r}", kind, f"must be one of {', '.join(map(repr, get_args(Kind)))}"
            )
    _registered[optimizer] = dict(kinds)


def kinds_of(optimizer: Optimizer) -> Kinds:
    """What is known of this optimizer's keys, without :data:`COMMON_KEYS`; nothing of an unknown one."""
    for kind in type(optimizer).__mro__:
        if kind in _registered:
            return _registered[kind]
        known = OPTIMIZERS.get(qualified(kind))
        if known is not None:
            return known
    return {}


def kind_of(optimizer: Optimizer, key: str) -> Kind | None:
    """Meaning of a key, or None."""
    return kinds_of(optimizer).get(key, COMMON_KEYS.get(key))


def refusal(optimizer: Optimizer) -> str | None:
    """Why an optimizer of this class cannot go through a change of variables, or None."""
    for kind in type(optimizer).__mro__:
        if kind in _registered or qualified(kind) in OPTIMIZERS:
            break
        reason = REFUSED.get(qualified(kind)) or REFUSED.get(kind.__name__)
        if reason:
            return reason
        if kind.__name__.lower().endswith(("8bit", "4bit", "fp8")):
            return _QUANTISED
    if getattr(getattr(optimizer, "args", None), "optim_bits", 32) == 8:
        return _QUANTISED
    return None


def qualified(kind: type) -> str:
    """Package and class, as in :data:`OPTIMIZERS`."""
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
