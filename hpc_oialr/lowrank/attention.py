"""``nn.MultiheadAttention`` with its projections as submodules, so that each can be low-rank."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_oialr.lowrank.attachment import cover_child
from hpc_oialr.lowrank.base import LowRankWeight
from hpc_oialr.lowrank.factored import factored_linear
from hpc_oialr.lowrank.layers import LowRankLinear


class FactorisedMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose input projections are submodules.

    :func:`unpack` changes an ordinary one into this class in place: ``in_proj_weight`` becomes the weight of a submodule
    ``in_proj`` (or ``q_proj``, ``k_proj``, ``v_proj``), the *same* parameter, which is then converted like any linear
    layer. Results, masks and options are torch's.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`torch.nn.MultiheadAttention.forward`, shapes and meaning of every argument."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched = query.dim() == 3
        same, inputs = query is key and key is value, [query, key, value]
        if not batched:
            inputs = [x.unsqueeze(0) for x in inputs]
        elif not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        q, k, v = self._project(inputs, same=same)
        k, v, extra = self._append_extra(k, v)
        q, k, v = (x.reshape(*x.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2) for x in (q, k, v))
        mask = self._mask(attn_mask, key_padding_mask, batched, q, extra)
        p, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.mT
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), p)
            y = weights @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, p)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return (y if self.batch_first else y.transpose(0, 1)), weights

    def _project(self, inputs: list[Tensor], *, same: bool) -> list[Tensor]:
        """q, k and v (B, L, dim) from the three inputs, which are the ``same`` tensor in self-attention."""
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if "in_proj" not in self._modules:
            layers = [self.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj")]
            out = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
        elif same:
            out = list(self.get_submodule("in_proj")(inputs[0]).chunk(3, dim=-1))
        else:
            layer = self.get_submodule("in_proj")
            out = [_rows(layer, x, part, self.embed_dim) for part, x in enumerate(inputs)]
        return [x if b is None else x + b for x, b in zip(out, biases, strict=True)]

    def _append_extra(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Append ``bias_k``, ``bias_v`` and the zero key; returns how many keys were added."""
        extra = 0
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(k.shape[0], -1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(v.shape[0], -1, -1)], dim=1)
            extra += 1
        if self.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(x.shape[0], 1, x.shape[2])], dim=1) for x in (k, v))
            extra += 1
        return k, v, extra

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, batched: bool, q: Tensor, extra: int
    ) -> Tensor | None:
        """One additive mask (B or 1, heads or 1, L, keys) from torch's two kinds, or none."""
        parts = []
        if attn_mask is not None:
            mask = _additive(attn_mask, q.dtype)
            parts.append(mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (-1, self.num_heads)))
        if padding is not None:
            mask = _additive(padding, q.dtype)
            parts.append((mask if batched else mask.unsqueeze(0))[:, None, None])
        if not parts:
            return None
        total = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return F.pad(total, (0, extra)) if extra else total


def _rows(layer: nn.Module, x: Tensor, part: int, rows: int) -> Tensor:
    """Apply the ``part``-th block of ``rows`` rows of a packed projection."""
    block = slice(part * rows, (part + 1) * rows)
    if type(layer) is LowRankLinear:
        U, S, Vh = layer.matched_factors()
        return factored_linear(x, Vh, S, U[block], None)
    if type(layer) is nn.Linear:
        return F.linear(x, layer.weight[block])
    # A layer of an engine, such as one sharded over ranks.
    return cast(Tensor, layer(x))[..., block]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, float("-inf"))


PROJECTIONS = {
    "in_proj_weight": "in_proj",
    "q_proj_weight": "q_proj",
    "k_proj_weight": "k_proj",
    "v_proj_weight": "v_proj",
}


def unpack(attention: nn.MultiheadAttention) -> FactorisedMultiheadAttention:
    """Make the input projections of ``attention`` submodules, in place; the parameters stay the same objects."""
    if isinstance(attention, FactorisedMultiheadAttention):
        return attention
    for parameter, module in PROJECTIONS.items():
        weight = attention._parameters.get(parameter)
        if weight is not None:
            # The slot stays, empty, so that merging puts the weight back in its place among the parameters.
            attention._parameters[parameter] = None
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = weight
            attention.add_module(module, layer)
            cover_child(attention, layer)
    attention.__class__ = FactorisedMultiheadAttention
    # torch's fused inference kernels read in_proj_weight; this flag keeps them off this layer.
    attention._qkv_same_embed_dim = False
    return cast(FactorisedMultiheadAttention, attention)


def repack(attention: FactorisedMultiheadAttention) -> nn.MultiheadAttention:
    """The inverse of :func:`unpack`, once every projection is dense again."""
    for parameter, module in PROJECTIONS.items():
        layer = attention._modules.pop(module, None)
        if layer is not None:
            assert not isinstance(layer, LowRankWeight)
            attention._parameters[parameter] = cast(nn.Parameter, layer.weight)
    attention.__class__ = nn.MultiheadAttention  # type: ignore[assignment]
    attention._qkv_same_embed_dim = attention._parameters.get("in_proj_weight") is not None
    return attention
