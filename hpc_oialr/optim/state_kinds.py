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
_COMMON: dict[Kind, str] = {
    "gradient": """exp_avg momentum_buffer grad_avg exp_avg_slow exp_avg_diff neg_exp_avg previous_grad prev_grad
        last_grad neg_pre_grad slow_momentum base_momentum old_g e_w sharpness kahan_comp""",
    "square": "exp_avg_sq max_exp_avg_sq exp_avg_var max_exp_avg_var square_avg sum acc_delta grad_sum_sq",
    "magnitude": "exp_inf",
    "weight": """z ax x0 slow_buffer slow_params slow_param slow_weights lookahead_slow_buff backup_params old_p
        master master_param master_params master_weight master_weights fp32_param""",
}
COMMON_KEYS: dict[str, Kind] = {key: kind for kind, keys in _COMMON.items() for key in keys.split()}

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
_FIRST: Kinds = {"exp_avg": "gradient"}
_BELIEF: Kinds = {"exp_avg": "gradient", "exp_avg_var": "square", "max_exp_avg_var": "square"}
_CENTRED: Kinds = {"square_avg": "centred", "grad_avg": "gradient", **_MOMENTUM}
_ADADELTA: Kinds = {"square_avg": "square", "acc_delta": "square"}
_ADAMAX: Kinds = {"exp_avg": "gradient", "exp_inf": "magnitude"}
_ADAN: Kinds = {
    **_ADAM, "exp_avg_diff": "gradient", "previous_grad": "gradient", "neg_pre_grad": "gradient"
}  # fmt: skip
_MARS: Kinds = {**_ADAM, "last_grad": "gradient"}
_MADGRAD: Kinds = {"grad_sum_sq": "square", "s": "gradient", "x0": "weight"}
_FREE: Kinds = {"z": "weight", "x": "weight", "y": "weight", "exp_avg_sq": "square"}
_MUON: Kinds = {**_ADAM, **_MOMENTUM}
_PLAIN: Kinds = {"momentum": "gradient"}

# By package: meanings, and the classes that have them.
_FAMILIES: dict[str, list[tuple[Kinds, str]]] = {
    "hpc_oialr": [(_MUON, "MuonAdamW")],
    "torch": [
        (_ADAM, "Adam AdamW NAdam RAdam"),
        (_MOMENTUM, "Muon SGD"),
        (_FIRST, "Adafactor"),
        (_ADADELTA, "Adadelta"),
        (_ADAMAX, "Adamax"),
        (_CENTRED, "RMSprop"),
        ({"ax": "weight"}, "ASGD"),
        ({"sum": "square"}, "Adagrad"),
        ({"prev": "gradient", "step_size": "step size"}, "Rprop"),
        ({}, "LBFGS"),
    ],
    "schedulefree": [
        (
            _FREE,
            """AdamWScheduleFree AdamWScheduleFreeClosure AdamWScheduleFreePaper AdamWScheduleFreeReference
            RAdamScheduleFree RAdamScheduleFreeClosure SGDScheduleFree SGDScheduleFreeClosure SGDScheduleFreeReference""",
        )
    ],
    "bitsandbytes": [
        ({"state1": "gradient"}, "Optimizer1State"),
        ({"state1": "gradient", "state2": "square"}, "Optimizer2State"),
    ],
    "transformers": [(_FIRST, "Adafactor")],
    "timm": [
        (_ADAM, "AdamP AdamWLegacy Adopt LaProp Lamb NAdamLegacy NAdamW RAdamLegacy"),
        (_MOMENTUM, "Lars SGDW"),
        (_CENTRED, "RMSpropTF"),
        (_BELIEF, "AdaBelief"),
        (_ADAN, "Adan"),
        (_FIRST, "Lion"),
        (_MADGRAD, "MADGRAD"),
        (_MARS, "Mars"),
        (_MUON, "Muon"),
        (_PLAIN, "SGDP"),
    ],
    "pytorch_optimizer": [
        (_ADAM, "ADOPT AdaBound AdamP Grams LaProp Lamb PAdam QHAdam RAdam StableAdamW Yogi"),
        (_MOMENTUM, "LARS QHM SGDW SignSGD"),
        (_FIRST, "AdaFactor CAME Lion Tiger"),
        (_BELIEF, "AdaBelief AdaNorm"),
        (_FREE, "ScheduleFreeAdamW ScheduleFreeRAdam ScheduleFreeSGD"),
        (_ADADELTA, "AdaDelta"),
        (_ADAMAX, "AdaMax"),
        (_ADAN, "Adan"),
        (_MADGRAD, "MADGRAD"),
        (_MARS, "MARS"),
        (_PLAIN, "SGDP"),
        ({"momentum_buffer": "weight"}, "AccSGD"),
        ({**_ADAM, "exp_avg_slow": "gradient"}, "AdEMAMix"),
        ({**_ADAM, "exp_avg_lr": "magnitude"}, "AdaMod"),
        ({**_ADAM, "neg_exp_avg": "gradient"}, "AdaPNM"),
        ({**_ADAM, "previous_grad": "gradient"}, "DiffGrad"),
        ({**_PLAIN, "fim": "square"}, "FAdam"),
        ({**_ADAM, "grok_exp_avg": "gradient"}, "GrokFastAdamW"),
        ({"moments": "gradient"}, "NovoGrad"),
        ({"pos_momentum": "gradient", "neg_momentum": "gradient"}, "PNM"),
        ({**_ADAM, "slow_buffer": "weight"}, "Ranger"),
    ],
}

# Package and class; a subclass has the meaning of its base, other keys are those of COMMON_KEYS.
OPTIMIZERS: dict[str, Kinds] = {
    f"{package}.{name}": kinds
    for package, families in _FAMILIES.items()
    for name, kinds in sorted(
        ((name, kinds) for kinds, names in families for name in names.split()), key=lambda each: each[0]
    )
}

_QUANTISED = "keeps quantised state"

# By the name of the class, in whichever package, because such optimizers are copied from file to file.
REFUSED: dict[str, str] = {
    name: reason
    for reason, names in {
        "keeps state of one form for small and of another for large matrices": "timm.Adafactor",
        "keeps sums over rows or columns in place of the matrix of second moments": """AdafactorBigVision SM3 Adalite
            EmoFact NorMuon AdamMini Adam_mini Amos Nero RACS NvNovoGrad""",
        "keeps its moments in a basis or preconditioner of its own": """Shampoo ScalableShampoo DistributedShampoo SOAP
            Kron PSGD Alice Conda Fira APOLLO GaLore GaLoreAdamW GaLoreAdafactor GaLoreAdamW8bit DASH SPlus LoRARite
            DeMo SaRA SPAM KFAC""",
        _QUANTISED: "FlashAdamW AdamW8bit Adam8bit AdamWFp8 AdamW4bit",
        "estimates one step size from sums over all entries, which a change of variables alters": """Prodigy
            DAdaptAdaGrad DAdaptAdam DAdaptAdan DAdaptLion DAdaptSGD""",
        "computes the weight anew from sums of gradients, entry by entry": "FTRL Ftrl",
        "steps inside the backward pass, on parameters that it remembers": "LOMO AdaLOMO AdaLomo",
        "keeps second derivatives of the dense weight": "AdaHessian Adahessian",
        "subtracts a square of its first moment from its second, which a rotation may make negative": "MSVAG",
        "takes sparse gradients, a core's are dense": "SparseAdam",
    }.items()
    for name in names.split()
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
            raise ConfigError(f"the kind of {key!r}", kind, f"must be one of {', '.join(map(repr, get_args(Kind)))}")
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
