"""Which weights of a model become low-rank, and why the others do not."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from hpc_oialr.errors import ConfigError, UnknownNameError
from hpc_oialr.lowrank.attention import PROJECTIONS, FactorisedMultiheadAttention
from hpc_oialr.lowrank.base import LowRankWeight, whole_shape
from hpc_oialr.lowrank.split_layers import SplitDense

log = logging.getLogger(__name__)

KINDS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "MultiheadAttention", "Conv1D")


def kind_of(module: nn.Module) -> str | None:
    """Name of the layer kind, or None if it is not one of :data:`KINDS` (subclasses are unknown kinds)."""
    if isinstance(module, SplitDense):
        return module.kind
    if type(module) in (nn.Linear, NonDynamicallyQuantizableLinear):
        return "Linear"
    if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention):
        return type(module).__name__
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
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
class Site:
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
        parameter = self.holder._parameters[self.weight_name]
        assert parameter is not None
        return parameter

    @property
    def weight_name(self) -> str:
        """Name of the dense weight in :attr:`holder`."""
        return self.parameter if self.holder is self.owner else "weight"

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


def select(model: nn.Module, selection: Selection | None = None) -> list[Site]:
    """The sites that become low-rank, in the order of the model's layers.

    Weights that are tied, parametrized (``weight_norm`` and the like), frozen, grouped, too thin or
    of unknown kind are left dense and named, with the reason, once in the log (level INFO).
    """
    selection = selection or Selection()
    sites = list(_candidates(model))
    uses = _uses(model)
    refused = {site.name: _refusal(site, sites, selection, uses) for site in sites}
    refused |= _unknown_kinds(model)
    left = [f"{name} ({reason})" for name, reason in refused.items() if reason]
    if left:
        log.info("left dense: %s", "; ".join(left))
    return [site for site in sites if refused[site.name] is None]


def replaceable(model: nn.Module) -> tuple[list[Site], dict[str, str]]:
    """Every site whose weight may be stored in another way, and the reason for each that must stay whole."""
    uses = _uses(model)
    refused = {site.name: _unfit(site, uses) for site in _candidates(model)}
    sites = [site for site in _candidates(model) if refused[site.name] is None]
    return sites, {name: reason for name, reason in refused.items() if reason} | _unknown_kinds(model)


def _uses(model: nn.Module) -> Counter[int]:
    """How often each parameter occurs."""
    return Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))


def _candidates(model: nn.Module) -> Iterator[Site]:
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind == "MultiheadAttention":
            for parameter, child in PROJECTIONS.items():
                if module._parameters.get(parameter) is not None:
                    yield Site(f"{name}.{child}" if name else child, module, parameter, kind)
        elif kind is not None and isinstance(getattr(module, "weight", None), Tensor):
            yield Site(name, module, "weight", kind)


def _refusal(site: Site, sites: list[Site], selection: Selection, uses: Counter[int]) -> str | None:
    """Why a site stays dense, or None."""
    reason = _unfit(site, uses)
    if reason is not None:
        return reason
    if site.kind not in selection.kinds or not selection.admits(site.name):
        return "not selected"
    if (selection.keep_last and site is sites[-1]) or (selection.keep_first and site is sites[0]):
        return "first or last layer"
    m, n = site.shape
    if min(m, n) < selection.min_dim or max(m, n) > selection.max_aspect * min(m, n):
        return f"its shape {m} x {n} is too thin"
    return None


def _unfit(site: Site, uses: Counter[int]) -> str | None:
    """Why the weight of a site must not be replaced, or None."""
    if site.owner._parameters.get(site.parameter) is None:
        return "its weight is parametrized"
    if uses[id(site.weight)] > 1:
        return "its weight is tied to another layer's"
    if not site.weight.requires_grad:
        return "its weight is frozen"
    if getattr(site.owner, "groups", 1) != 1:
        return "it is a grouped convolution"
    return None


def _unknown_kinds(model: nn.Module) -> dict[str, str]:
    """Modules with a matrix named ``weight`` that no kind covers; embeddings and norms are no surprise."""
    reasons = {}
    for name, module in model.named_modules():
        if kind_of(module) is not None or isinstance(module, (nn.Embedding, nn.EmbeddingBag, LowRankWeight)):
            continue
        if parametrize.is_parametrized(module):
            reasons[name] = "its weight is parametrized"
        elif any(
            p is not None and p.dim() > 1 and key.startswith("weight")
            for key, p in module._parameters.items()
        ):
            reasons[name] = f"unknown kind {type(module).__name__}"
    return reasons
