"""Autoformer with the published attention, by Fourier transforms alone: what it computes on a device stays there.

Imported where a model is built: transformers takes seconds to load.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.autoformer.modeling_autoformer import AutoformerAttention, AutoformerForPrediction

from hpc_oialr.errors import ConfigError
from hpc_oialr.torch_compat import unchecked_distributions


class AutoCorrelation(AutoformerAttention):  # type: ignore[misc]
    """Attention that transformers' module of the same weights stands for; gives no attention weights.

    transformers' own mixes samples: each head's values get the weights of another sample of the batch. It also cuts
    queries longer than the keys, and rolls the values once for each of about log L delays, read back from the device.
    """

    def forward(self, hidden_states: Tensor, key_value_states: Tensor | None = None, **given: Any) -> Any:
        """B x L x D; a cache or a mask is refused."""
        if any(given.get(name) is not None for name in ("cache", "past_key_values", "attention_mask")):
            raise NotImplementedError("no cache, no mask; set model.attention to transformers")
        source = hidden_states if key_value_states is None else key_value_states
        query, key, value = self.q_proj(hidden_states), self.k_proj(source), self.v_proj(source)
        count = int(self.autocorrelation_factor * math.log(query.shape[1]))
        return self.out_proj(aggregate(query, key, value, count, shared=self.training)), None


class PublishedAutoformer(AutoformerForPrediction):  # type: ignore[misc]
    """transformers' model with :class:`AutoCorrelation` in place of its attention; a step reads nothing back.

    ``export_note`` is what an export says to those who load its weights elsewhere.
    """

    export_note = (
        "transformers' AutoformerForPrediction gives other forecasts from these weights, which depend on the rest of a "
        "batch: load them by hpc_oialr.load_factored, or train with model.attention=transformers"
    )

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """As transformers' own."""
        with unchecked_distributions():
            return super().forward(*inputs, **named)


def use_published_attention(model: nn.Module) -> None:
    """Change an ``AutoformerForPrediction`` in place; names and weights stay. ConfigError before transformers 5."""
    if "layer_head_mask" in inspect.signature(AutoformerAttention.forward).parameters:
        fix = 'Install transformers 5: pip install "transformers>=5".'
        raise ConfigError("model.attention", "published", "needs the modules of transformers 5", fix=fix)
    model.__class__ = PublishedAutoformer
    # transformers makes no mask for an attention it does not know. For its own it would make one while a CUDA graph is
    # captured (5.17) or a program exported, of a tensor that it copies from the host.
    config: Any = model.config
    config._attn_implementation = "autocorrelation"
    for module in model.modules():
        if type(module) is AutoformerAttention:
            module.__class__ = AutoCorrelation


def aggregate(query: Tensor, key: Tensor, value: Tensor, count: int, *, shared: bool) -> Tensor:
    """Values at the ``count`` delays of the largest autocorrelation, weighted by its softmax (arXiv 2106.13008, eq. 6).

    With c the correlation of query and key over time, the mean over all channels, this is
    ``y(t) = sum_i softmax(c)_i v(t + tau_i)``: the correlation of the values with a signal that is zero but at the
    delays, so a product of two spectra.

    Parameters
    ----------
    query, key, value
        B x L x D, B x M x D, B x M x D. Keys and values are cut, or filled with zeros, to L time steps.
    shared
        Whether the delays are those of the batch's mean, as in training, or each sample's own.

    Returns
    -------
    B x L x D, in ``O(B L log L D)`` operations.
    """
    length, dtype = query.shape[1], value.dtype
    Q, K, V = (_spectrum(x[:, :length], length) for x in (query, key, value))
    correlation = torch.fft.irfft((Q * K.conj()).mean(dim=2), n=length, dim=1)
    if shared:
        delays = correlation.mean(dim=0).topk(count).indices.expand(len(correlation), count)
    else:
        delays = correlation.topk(count, dim=1).indices
    weights = correlation.gather(1, delays).softmax(dim=1)
    pulses = torch.zeros_like(correlation).scatter(1, delays, weights)
    moved: Tensor = torch.fft.irfft(_spectrum(pulses[..., None], length).conj() * V, n=length, dim=1)
    return moved.to(dtype)


def _spectrum(x: Tensor, length: int) -> Tensor:
    """Of B x L x D along time; there is no transform in half precision."""
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    found: Tensor = torch.fft.rfft(x, n=length, dim=1)
    return found
