"""From a dense layer to a low-rank one in place, and back to a dense model; what a model then counts."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.linalg.svd import compute_dtype, svd
from hpc_oialr.lowrank.attachment import untie
from hpc_oialr.lowrank.attention import FactorisedMultiheadAttention, repack, unpack
from hpc_oialr.lowrank.base import Crossover, LowRankWeight, rounding_bound, whole_shape
from hpc_oialr.lowrank.kernel_modes import Inner, channel_unfoldings, factor_shapes, is_tucker, leading_channels
from hpc_oialr.lowrank.layers import LowRankConv1D, LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLinear
from hpc_oialr.lowrank.layout import REPLICATED, Replicated
from hpc_oialr.lowrank.selection import Selection, select
from hpc_oialr.lowrank.targets import TargetWeight
from hpc_oialr.lowrank.tucker import TuckerConv1d, TuckerConv2d, TuckerConv3d, takes_tucker

Model = TypeVar("Model", bound=nn.Module)

LAYERS: dict[str, type[LowRankWeight]] = {
    "Linear": LowRankLinear,
    "MultiheadAttention": LowRankLinear,
    "Conv1D": LowRankConv1D,
    "Conv1d": LowRankConv1d,
    "Conv2d": LowRankConv2d,
    "Conv3d": LowRankConv3d,
}
TUCKER: dict[str, type[LowRankWeight]] = {"Conv1d": TuckerConv1d, "Conv2d": TuckerConv2d, "Conv3d": TuckerConv3d}


@exact_arithmetic()
def convert_weight(
    target: TargetWeight,
    U: Tensor,
    S: Tensor,
    Vh: Tensor,
    *,
    factor_dtype: torch.dtype | None = None,
    crossover: Crossover = 1.0,
) -> LowRankWeight:
    """Replace the dense weight of ``target``, which is freed; U and Vh are stored in ``factor_dtype`` or its dtype."""
    if target.kind == "MultiheadAttention":
        unpack(target.owner)  # type: ignore[arg-type]
    weight = target.weight
    weight.grad = None
    stored = factor_dtype or weight.dtype
    parts = (U.to(stored), S.to(weight.dtype), Vh.to(stored))
    kinds = TUCKER if is_tucker(S, Vh) else LAYERS
    return kinds[target.kind].adopt(target.holder, *parts, crossover=crossover)


def leave_fused_inference(model: nn.Module) -> None:
    """Keep torch's encoders off nested tensors, which only torch's own fused attention understands."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and not hasattr(module, "dense_use_nested_tensor"):
            module.dense_use_nested_tensor, module.use_nested_tensor = module.use_nested_tensor, False  # type: ignore[assignment]


@exact_arithmetic()
def convert(
    model: nn.Module,
    selection: Selection | None = None,
    *,
    fraction: float = 1.0,
    conv: Literal["flattened", "tucker"] = "flattened",
) -> list[TargetWeight]:
    """Convert every selected layer of ``model`` in place by an SVD, of which ``fraction`` of the k triplets is kept.

    For use without a training loop; :class:`hpc_oialr.OIALR` converts a model in training, and the optimizer's state
    with it. With ``conv="tucker"`` convolutions get bases for their channels, of each of which ``fraction`` is kept.
    Raises :class:`NonFiniteError` if a weight holds NaN or Inf.
    """
    targets = select(model, selection)
    leave_fused_inference(model)
    for target in targets:
        W = target.weight.detach().reshape(target.shape)
        if takes_tucker(target, conv):
            modes = (svd(A, name=target.name) for A in channel_unfoldings(W, target.dense_shape[1]))
            bases = [U[:, : max(1, round(fraction * len(s)))] for U, s, _ in modes]
            convert_weight(target, *leading_channels(W, *bases))
            continue
        U, s, Vh = svd(W, name=target.name)
        r = max(1, round(fraction * target.k))
        convert_weight(target, U[:, :r], torch.diag(s[:r]), Vh[:r])
    return targets


@exact_arithmetic()
def empty_factors(
    target: TargetWeight,
    r: Inner,
    *,
    layout: Replicated = REPLICATED,
    factor_dtype: torch.dtype | None = None,
    crossover: Crossover = 1.0,
) -> LowRankWeight:
    """Give ``target`` zero factors of inner dimension ``r``, to be filled from a checkpoint."""
    weight = target.weight
    (m, r_out), core, (r_in, n) = factor_shapes(target.dense_shape, r)
    rows, columns = layout.own_rows(m), layout.own_columns(n)
    zeros = partial(torch.zeros, dtype=compute_dtype(weight.dtype), device=weight.device)
    U, Vh = layout.put_bases(zeros(rows.stop - rows.start, r_out), zeros(r_in, columns.stop - columns.start), m, n)
    S = layout.put_core(zeros(*core))
    return convert_weight(target, U, S, Vh, factor_dtype=factor_dtype, crossover=crossover)


@exact_arithmetic()
def merge(model: Model, *, inplace: bool = False) -> Model:
    """A dense model with the original classes, parameter names, order and dtypes.

    Its state dict loads into the untouched original model with ``strict=True``.

    Parameters
    ----------
    model
        Any module, with or without low-rank layers.
    inplace
        Change ``model`` itself; otherwise it is copied first (which takes the memory of a copy).
    """
    if not inplace:
        model = copy.deepcopy(model)
        untie(model)
    layers = low_rank_layers(model)
    frozen = {name: layer for name, layer in layers.items() if not layer.bases_trained}
    written = [name for name, x in frozen.items() if x.bases_error() > rounding_bound(x.U.dtype)]
    if written:
        # A copy whose parameters were averaged or decayed one by one is a product of three wrong factors.
        warnings.warn(
            f"U or Vh of {', '.join(written)} is not orthonormal: something has written into these frozen bases, such "
            "as an average, a clipping or a decay over model.parameters(), and the merged weight is wrong if that was "
            "meant for weights. Give averages to OIALR(..., averages=[...]), and let loops skip what does not require "
            "a gradient.",
            stacklevel=3,
        )
    for layer in layers.values():
        layer.become_dense()
    for module in list(model.modules()):
        if isinstance(module, FactorisedMultiheadAttention):
            repack(module)
        elif isinstance(module, nn.TransformerEncoder) and hasattr(module, "dense_use_nested_tensor"):
            module.use_nested_tensor = module.__dict__.pop("dense_use_nested_tensor")
    return model


def low_rank_layers(model: nn.Module) -> dict[str, LowRankWeight]:
    """The low-rank layers of ``model`` by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRankWeight)}


def untied_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without second names of tied weights."""
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def trainable_parameters(model: nn.Module) -> int:
    """Numbers that are trained: every parameter that requires a gradient, each counted once."""
    return sum(whole_shape(p).numel() for p in model.parameters() if p.requires_grad)


def dense_parameters(model: nn.Module) -> int:
    """Trainable numbers of the dense twin: low-rank weights count m n instead of their core."""
    layers = low_rank_layers(model).values()
    free = sum(layer.r * (layer.m + layer.n) for layer in layers if layer.U.requires_grad)
    saved = sum(layer.m * layer.n - whole_shape(layer.S).numel() for layer in layers)
    return trainable_parameters(model) + saved - free
