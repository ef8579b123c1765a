"""Which weights of a model become low-rank, and why the others do not."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from hpc_oialr.errors import ConfigError, ModelError, UnknownNameError
from hpc_oialr.lowrank.attention import PROJECTIONS, FactorisedMultiheadAttention
from hpc_oialr.lowrank.base import LowRankWeight, whole_shape
from hpc_oialr.lowrank.refusals import Refusal, bare_matrices, shared_memory, use_refusal, value_refusal

log = logging.getLogger(__name__)

KINDS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "MultiheadAttention", "Conv1D")


def kind_of(module: nn.Module) -> str | None:
    """Name of the layer kind, or None if it is not one of :data:`KINDS` (subclasses are unknown kinds)."""
    return _kind_of_class(type(module))


def _kind_of_class(layer: type[nn.Module]) -> str | None:
    sharded = layer.__dict__.get("low_rank_kind")  # an engine's class, put on a layer of this kind
    if sharded is not None:
        return str(sharded)
    if layer in (nn.Linear, NonDynamicallyQuantizableLinear):
        return "Linear"
    if layer in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention):
        return layer.__name__
    if layer.__name__ == "Conv1D" and layer.__module__ == "transformers.pytorch_utils":
        return "Conv1D"
    return None


@dataclass(kw_only=True)
class Selection:
    """Which layers take part.

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
            raise ConfigError(
                "max_aspect", self.max_aspect, "must be at least 1", fix="The published code uses 10."
            )
        if self.min_dim < 1:
            raise ConfigError("min_dim", self.min_dim, "must be at least 1")

    def admits(self, name: str) -> bool:
        """Whether the name patterns let this layer in."""
        included = any(fnmatchcase(name, pattern) for pattern in self.include)
        return included and not any(fnmatchcase(name, pattern) for pattern in self.exclude)


@dataclass(eq=False)
class TargetWeight:
    """One weight that can be low-rank: a layer's ``weight``, or an attention's input projection.

    Attributes
    ----------
    name
        Dotted name of the layer that holds, or will hold, the factors.
    owner
        The module with the dense parameter.
    parameter
        Name of the dense parameter in ``owner``.
    kind
        One of :data:`KINDS`.
    """

    name: str
    owner: nn.Module
    parameter: str
    kind: str

    @property
    def holder(self) -> nn.Module:
        """The module that holds the weight now: the owner, or an unpacked attention's projection."""
        if isinstance(self.owner, FactorisedMultiheadAttention) and self.parameter in PROJECTIONS:
            return self.owner.get_submodule(PROJECTIONS[self.parameter])
        return self.owner

    @property
    def low_rank(self) -> LowRankWeight | None:
        """The low-rank layer, or None while the weight is dense."""
        holder = self.holder
        return holder if isinstance(holder, LowRankWeight) else None

    @property
    def weight(self) -> nn.Parameter:
        """The dense weight (any number of axes); only before the conversion."""
        parameter = self.stored
        if parameter is None:
            raise ModelError(
                f"layer {self.name} has no parameter {self.weight_name!r} any more: it was parametrized, pruned or "
                "removed after OIALR(...). Do so before, and the layer is left dense."
            )
        return parameter

    @property
    def weight_name(self) -> str:
        """Name of the dense weight in :attr:`holder`."""
        return self.parameter if self.holder is self.owner else "weight"

    @property
    def stored(self) -> nn.Parameter | None:
        """The dense weight; None where it was made something else than a parameter."""
        return self.holder._parameters.get(self.weight_name)

    @property
    def trained(self) -> nn.Parameter:
        """What the optimizer trains: the dense weight, later the core ``S``."""
        layer = self.low_rank
        return self.weight if layer is None else layer.S

    @property
    def shape(self) -> tuple[int, int]:
        """m and n: (leading axis) x (all the rest)."""
        layer = self.low_rank
        if layer is not None:
            return layer.m, layer.n
        shape = whole_shape(self.weight)
        return shape[0], shape.numel() // max(1, shape[0])

    @property
    def k(self) -> int:
        """min(m, n)."""
        return min(self.shape)


def select(
    model: nn.Module, selection: Selection | None = None, *, frozen: bool = False, low_rank: bool = False
) -> list[TargetWeight]:
    """The targets that become low-rank, in the order of the model's layers.

    Weights that are tied, parametrized (``weight_norm`` and the like), frozen, grouped, too thin, of unknown
    kind or in some way that a conversion would undo are left dense and named, with the reason, once in the log
    (level INFO; WARNING if unknown kinds hold most of the model's numbers).

    Parameters
    ----------
    frozen
        Take weights that are frozen at the moment as well.
    low_rank
        Take layers that are low-rank already as well.
    """
    return examine(model, selection, frozen=frozen, low_rank=low_rank)[0]


def examine(
    model: nn.Module, selection: Selection | None = None, *, frozen: bool = False, low_rank: bool = False
) -> tuple[list[TargetWeight], dict[str, Refusal]]:
    """As :func:`select`, and why each of the others stays dense.

    Raises
    ------
    ModelError
        If a layer is low-rank that ``selection`` leaves out, and ``low_rank`` is set.
    """
    selection = selection or Selection()
    every = every_weight(model)
    targets = [target for target in every if low_rank or target.low_rank is None]
    shared = Shared.of(model)
    refused = {}
    for target in targets:
        refusal = _refusal(target, every, selection, shared, frozen=frozen)
        if refusal is not None:
            refused[target.name] = refusal
            _require_dense(target, refusal)
    unknown, share = _unknown_kinds(model, targets)
    _log_dense(model, targets, refused | unknown, share)
    return [target for target in targets if target.name not in refused], refused | unknown


def _require_dense(target: TargetWeight, refusal: Refusal) -> None:
    if target.low_rank is not None:
        raise ModelError(
            f"layer {target.name} is low-rank already, but oialr.selection leaves it dense ({refusal.reason}). Give the "
            "selection it was made with; or make it dense by hpc_oialr.merge(model, inplace=True), then the optimizer."
        )


def _log_dense(
    model: nn.Module, targets: Sequence[TargetWeight], refused: Mapping[str, Refusal], share: float
) -> None:
    if not refused:
        return
    owners = {target.name: target.owner for target in targets}
    position = {module: i for i, module in enumerate(model.modules())}
    modules = dict(model.named_modules())

    def place(name: str) -> int:
        parent = name if name in modules else name.rpartition(".")[0]
        return position[owners[name] if name in owners else modules[parent]]

    names = sorted(refused, key=place)
    text = "; ".join(f"{name or 'the model itself'} ({refused[name].reason})" for name in names)
    log.log(logging.WARNING if share >= 0.5 else logging.INFO, "left dense: %s", text)


def replaceable(model: nn.Module) -> tuple[list[TargetWeight], dict[str, str]]:
    """Every target whose weight may be stored in another way, and the reason for each that must stay whole."""
    targets, shared = [target for target in every_weight(model) if target.low_rank is None], Shared.of(model)
    refused = {target.name: unfit(target, shared) for target in targets}
    left = {name: refusal for name, refusal in refused.items() if refusal} | _unknown_kinds(model, targets)[0]
    return [target for target in targets if target.name not in left], {
        name: each.reason for name, each in left.items()
    }


@dataclass(frozen=True)
class Shared:
    """What parameters of a model have in common.

    Attributes
    ----------
    uses
        How often each parameter (by id) occurs.
    memory
        See :func:`~hpc_oialr.lowrank.refusals.shared_memory`.
    """

    uses: Counter[int]
    memory: dict[int, str]

    @classmethod
    def of(cls, model: nn.Module) -> Shared:
        """Of this model, at this moment."""
        uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        return cls(uses, shared_memory(model))


def every_weight(model: nn.Module) -> list[TargetWeight]:
    """Every weight of a known kind, dense or low-rank, in the order of the dense model."""
    targets: list[TargetWeight] = []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        unpacked = isinstance(module, FactorisedMultiheadAttention) and _projects_at_low_rank(module)
        kind = "MultiheadAttention" if unpacked else kind_of(module)
        if module in inside:
            continue
        if kind == "MultiheadAttention":
            for parameter, child in PROJECTIONS.items():
                if module._parameters.get(parameter) is not None or (unpacked and child in module._modules):
                    targets.append(
                        TargetWeight(f"{name}.{child}" if name else child, module, parameter, kind)
                    )
                    inside |= {module._modules[child]} if unpacked else set()
        elif isinstance(module, LowRankWeight):
            targets.append(
                TargetWeight(name, module, "weight", _kind_of_class(module.dense_class) or "Linear")
            )
        elif kind is not None and isinstance(getattr(module, "weight", None), Tensor):
            targets.append(TargetWeight(name, module, "weight", kind))
    return targets


def _projects_at_low_rank(attention: FactorisedMultiheadAttention) -> bool:
    # TensorEngine splits projections as linear layers of their own.
    inside = [attention._modules.get(child) for child in PROJECTIONS.values()]
    return any(isinstance(m, LowRankWeight) and not hasattr(m, "shard_spec") for m in inside)


def _refusal(
    target: TargetWeight, targets: list[TargetWeight], selection: Selection, shared: Shared, *, frozen: bool
) -> Refusal | None:
    """Why a target stays dense, or None."""
    if target.kind not in selection.kinds or not selection.admits(target.name):
        return Refusal("not selected")
    if (selection.keep_last and target is targets[-1]) or (selection.keep_first and target is targets[0]):
        return Refusal("first or last layer")
    refusal = unfit(target, shared, frozen=frozen) if target.low_rank is None else None
    if refusal is not None:
        return refusal
    m, n = target.shape
    if min(m, n) < selection.min_dim or max(m, n) > selection.max_aspect * min(m, n):
        return Refusal(f"its shape {m} x {n} is too thin")
    return None


def unfit(target: TargetWeight, shared: Shared, *, frozen: bool = False) -> Refusal | None:
    """Why the weight of a dense target must not be replaced, or None; ``frozen`` ones may be."""
    holder, weight = target.holder, target.stored
    if weight is None or parametrize.is_parametrized(holder):
        return Refusal("its weight is parametrized")
    if shared.uses[id(weight)] > 1:
        return Refusal("its weight is tied to another layer's")
    if not weight.requires_grad and not frozen and weight.dtype.is_floating_point:
        return Refusal("its weight is frozen")
    if id(weight) in shared.memory:
        return Refusal(f"its weight shares memory with {shared.memory[id(weight)]}", warn=True)
    if getattr(target.owner, "groups", 1) != 1:
        return Refusal("it is a grouped convolution")
    return value_refusal(weight) or use_refusal(holder, weight)


def _unknown_kinds(model: nn.Module, targets: Sequence[TargetWeight]) -> tuple[dict[str, Refusal], float]:
    """Matrices that no kind covers, with their share of the model's numbers, and the share of all of them.

    Embeddings and norms are no surprise.
    """
    known = {id(p) for target in targets if (p := target.stored) is not None}
    total = max(1, sum(_numbers(p) for p in model.parameters()))
    refused: dict[str, Refusal] = {}
    held = 0
    for name, module in model.named_modules():
        if isinstance(
            module, (nn.Embedding, nn.EmbeddingBag, LowRankWeight, parametrize.ParametrizationList)
        ):
            continue
        if kind_of(module) is None and parametrize.is_parametrized(module):
            refused[name] = Refusal("its weight is parametrized")
            continue
        bare = dict(bare_matrices(module, known))
        held += sum(map(_numbers, bare.values()))
        plain = {key for key in bare if key.startswith("weight") and kind_of(module) is None}
        if plain:
            refused[name] = Refusal(_describe_kind(module, [bare[key] for key in plain], total))
        for key in bare.keys() - plain:
            refused[f"{name}.{key}" if name else key] = Refusal(_describe(bare[key], total))
    return refused, held / total


def _describe_kind(module: nn.Module, weights: Sequence[Tensor], total: int) -> str:
    kind = f"unknown kind {type(module).__name__}"
    if any(isinstance(weight, UninitializedParameter) for weight in weights):
        return f"{kind} without a shape yet; call the model once before OIALR(...)"
    return f"{kind}, {sum(map(_numbers, weights)) / total:.0%} of all numbers"


def _describe(parameter: Tensor, total: int) -> str:
    shape = " x ".join(map(str, whole_shape(parameter)))
    return f"a bare parameter, {shape}, {_numbers(parameter) / total:.0%} of all numbers"


def _numbers(parameter: Tensor) -> int:
    return 0 if isinstance(parameter, UninitializedParameter) else whole_shape(parameter).numel()
