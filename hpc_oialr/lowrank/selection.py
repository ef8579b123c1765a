"""Which weights of a model become low-rank, and why the others do not."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from hpc_oialr.errors import ConfigError, ModelError, UnknownNameError
from hpc_oialr.lowrank.base import LowRankWeight, whole_shape
from hpc_oialr.lowrank.marks import gradient_hooks, own_attributes
from hpc_oialr.lowrank.targets import KINDS, TargetWeight, every_weight, kind_of

log = logging.getLogger(__name__)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Packages whose classes low-rank layers can take the place of.
FORWARDS = ("torch", "transformers", "hpc_oialr")


@dataclass(kw_only=True)
class Selection:
    """Which layers become low-rank.

    Parameters
    ----------
    include, exclude
        Shell patterns over layer names, e.g. ``"encoder.*"``; a layer must match one of ``include``
        and none of ``exclude``.
    kinds
        Layer kinds, a subset of :data:`KINDS`.
    keep_first, keep_last
        Leave the first or last layer dense. The published code always keeps the last.
    max_aspect
        A weight is left alone if one side is more than this many times the other.
    min_dim
        A weight is left alone if its shorter side is below this.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    kinds: tuple[str, ...] = KINDS
    keep_first: bool = False
    keep_last: bool = True
    max_aspect: float = 10.0
    min_dim: int = 2

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise UnknownNameError("layer kind", kind, KINDS)
        if self.max_aspect < 1:
            raise ConfigError("max_aspect", self.max_aspect, "must be at least 1", fix="The published code uses 10.")
        if self.min_dim < 1:
            raise ConfigError("min_dim", self.min_dim, "must be at least 1")

    def admits(self, name: str) -> bool:
        """Whether the name patterns include this layer."""
        included = any(fnmatchcase(name, pattern) for pattern in self.include)
        return included and not any(fnmatchcase(name, pattern) for pattern in self.exclude)


class Refusal(NamedTuple):
    """Why a weight stays dense; ``warn`` where no setting says so, and the user should know."""

    reason: str
    warn: bool = False


def select(
    model: nn.Module, selection: Selection | None = None, *, frozen: bool = False, low_rank: bool = False
) -> list[TargetWeight]:
    """The targets that become low-rank, in the order of the model's layers.

    Weights that are tied, parametrized (``weight_norm`` and the like), frozen, grouped, too thin, of unknown
    kind or changed in a way that a conversion would undo stay dense; the log names them with the reason
    (level INFO; WARNING if unknown kinds have most of the model's numbers).

    With ``frozen`` weights that are frozen at the moment are selected as well, with ``low_rank`` layers that are
    low-rank already.
    """
    return examine(model, selection, frozen=frozen, low_rank=low_rank)[0]


def examine(
    model: nn.Module, selection: Selection | None = None, *, frozen: bool = False, low_rank: bool = False
) -> tuple[list[TargetWeight], dict[str, Refusal]]:
    """As :func:`select`, and why each of the others stays dense.

    Raises :class:`ModelError` if a layer is low-rank that ``selection`` leaves out, and ``low_rank`` is set.
    """
    selection = selection or Selection()
    every = every_weight(model)
    targets = [target for target in every if low_rank or target.low_rank is None]
    shared = shared_weights(model)
    refused = {}
    for target in targets:
        refusal: Refusal | None = None
        if target.kind not in selection.kinds or not selection.admits(target.name):
            refusal = Refusal("not selected")
        elif (selection.keep_last and target is every[-1]) or (selection.keep_first and target is every[0]):
            refusal = Refusal("first or last layer")
        elif target.low_rank is None:
            refusal = unfit(target, shared, frozen=frozen)
        if refusal is None:
            m, n = target.shape
            if min(m, n) < selection.min_dim or max(m, n) > selection.max_aspect * min(m, n):
                refusal = Refusal(f"its shape {m} x {n} is too thin")
        if refusal is None:
            continue
        if target.low_rank is not None:
            raise ModelError(
                f"layer {target.name} is low-rank already, but oialr.selection leaves it dense ({refusal.reason}). Give "
                "the selection it was made with; or make it dense by hpc_oialr.merge(model, inplace=True), then the "
                "optimizer."
            )
        refused[target.name] = refusal
    unknown, share = _unknown_kinds(model, targets)
    targets = [target for target in targets if target.name not in refused]
    refused |= unknown
    if refused:
        # In the order of the model; a bare parameter or projection stands where its module does.
        place = {name: i for i, (name, _) in enumerate(model.named_modules())}
        names = sorted(refused, key=lambda name: place.get(name, place.get(name.rpartition(".")[0], 0)))
        text = "; ".join(f"{name or 'the model itself'} ({refused[name].reason})" for name in names)
        log.log(logging.WARNING if share >= 0.5 else logging.INFO, "left dense: %s", text)
    return targets, refused


def replaceable(model: nn.Module) -> tuple[list[TargetWeight], dict[str, str]]:
    """Every dense target whose weight may be stored in another way, and the reason for each that must stay whole."""
    targets = [target for target in every_weight(model) if target.low_rank is None]
    shared = shared_weights(model)
    refused = {target.name: refusal for target in targets if (refusal := unfit(target, shared))}
    refused |= _unknown_kinds(model, targets)[0]
    reasons = {name: refusal.reason for name, refusal in refused.items()}
    return [target for target in targets if target.name not in refused], reasons


def unfit(target: TargetWeight, shared: Mapping[int, Refusal], *, frozen: bool = False) -> Refusal | None:
    """Why the weight of a dense target must not be replaced, or None; ``frozen`` ones may be.

    ``shared`` comes from :func:`shared_weights`.
    """
    weight = target.stored
    if weight is None or parametrize.is_parametrized(target.holder):
        return Refusal("its weight is parametrized")
    if id(weight) in shared:
        return shared[id(weight)]
    if not weight.requires_grad and not frozen and weight.dtype.is_floating_point:
        return Refusal("its weight is frozen")
    if getattr(target.owner, "groups", 1) != 1:
        return Refusal("it is a grouped convolution")
    reason = _lost_in_conversion(target.holder, weight)
    return None if reason is None else Refusal(reason, warn=True)


def _lost_in_conversion(holder: nn.Module, weight: nn.Parameter) -> str | None:
    """Why a weight cannot be factorised, or what the user did to it and a conversion would lose; or None."""
    # FakeTensor: the dry run of a plan has such.
    if not (type(weight) in (Tensor, nn.Parameter, DTensor) or type(weight).__name__ == "FakeTensor"):
        return f"its weight is a {type(weight).__name__}"
    if weight.dtype not in DTYPES:
        return f"its weight is of dtype {str(weight.dtype).removeprefix('torch.')}"
    if weight.layout is not torch.strided:
        return f"its weight is stored as {str(weight.layout).removeprefix('torch.')}"
    tensors = [name for name, value in own_attributes(weight).items() if isinstance(value, Tensor)]
    if tensors:
        return f"its weight has tensors of its own, which a core cannot take: {', '.join(tensors)}"
    if gradient_hooks(weight):
        return "its weight has a gradient hook, which would not be called for a core"
    own = {*holder.__dict__, *holder._parameters, *holder._buffers, *holder._modules}
    taken = sorted((own & _reserved_names()) - set(getattr(holder, "low_rank_attributes", ())))
    if taken:
        return f"it has attributes of its own that a low-rank layer needs: {', '.join(taken)}"
    forward = type(holder).forward
    if str(getattr(forward, "__module__", "")).partition(".")[0] not in FORWARDS:
        return f"the forward of {type(holder).__name__} was replaced for all its layers"
    if "forward" in holder.__dict__:
        return "its forward was replaced on this object"
    return None


def _reserved_names() -> frozenset[str]:
    """Attributes of a dense layer that would get lost in its low-rank form, or get in its way."""
    classes, names = [LowRankWeight], set(LowRankWeight.__annotations__)
    while classes:
        each = classes.pop()
        classes += each.__subclasses__()
        names |= vars(each).keys()
    # A dense layer has its bias and its forward too; the latter is looked at on its own.
    return frozenset(name for name in names - {"bias", "forward", "weight"} if not name.startswith("__"))


def shared_weights(model: nn.Module) -> dict[int, Refusal]:
    """The parameters (by id) that occur more than once, or share memory with another parameter or a buffer."""
    spans = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta
        if plain and tensor.layout is torch.strided and tensor.numel() > 0:
            start, steps = tensor.data_ptr(), zip(tensor.shape, tensor.stride(), strict=True)
            last = sum((size - 1) * stride for size, stride in steps)
            spans.append((start, start + (last + 1) * tensor.itemsize, id(tensor), name))
    others: dict[int, str] = {}
    furthest = (0, 0, 0, "")
    for span in sorted(spans, key=lambda span: span[:2]):
        if span[0] < furthest[1]:
            others.setdefault(span[2], furthest[3])
            others.setdefault(furthest[2], span[3])
        furthest = max(furthest, span, key=lambda each: each[1])
    found = {key: Refusal(f"its weight shares memory with {name}", warn=True) for key, name in others.items()}
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return found | {key: Refusal("its weight is tied to another layer's") for key, n in uses.items() if n > 1}


def _unknown_kinds(model: nn.Module, targets: Sequence[TargetWeight]) -> tuple[dict[str, Refusal], float]:
    """Matrices of no known kind, except embeddings, each with its share of the numbers; and the total share."""
    known = {id(p) for target in targets if (p := target.stored) is not None}
    total = max(1, sum(_numbers(p) for p in model.parameters()))
    skipped = (nn.Embedding, nn.EmbeddingBag, LowRankWeight, parametrize.ParametrizationList)
    refused: dict[str, Refusal] = {}
    held = 0
    for name, module in model.named_modules():
        if isinstance(module, skipped):
            continue
        unknown = kind_of(type(module)) is None
        if unknown and parametrize.is_parametrized(module):
            refused[name] = Refusal("its weight is parametrized")
            continue
        weights = []
        for key, p in module._parameters.items():
            if p is None or id(p) in known:
                continue
            lazy = isinstance(p, UninitializedParameter)
            if not (key.startswith("weight") if lazy else sum(size > 1 for size in whole_shape(p)) > 1):
                continue  # no matrix
            held += _numbers(p)
            if unknown and key.startswith("weight"):
                weights.append(p)
            else:
                shape = " x ".join(map(str, whole_shape(p)))
                reason = f"a bare parameter, {shape}, {_numbers(p) / total:.0%} of all numbers"
                refused[f"{name}.{key}" if name else key] = Refusal(reason)
        if weights:
            share = f", {sum(map(_numbers, weights)) / total:.0%} of all numbers"
            if any(isinstance(weight, UninitializedParameter) for weight in weights):
                share = " without a shape yet; call the model once before OIALR(...)"
            refused[name] = Refusal(f"unknown kind {type(module).__name__}{share}")
    return refused, held / total


def _numbers(parameter: Tensor) -> int:
    return 0 if isinstance(parameter, UninitializedParameter) else whole_shape(parameter).numel()
