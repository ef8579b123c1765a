"""Transformers: images (ViT), text (GPT-2, Llama), time series (Autoformer)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from hpc_oialr.data.base import Batch
from hpc_oialr.engines.tensor.pairs import ColumnRowPair
from hpc_oialr.errors import ConfigError, check_interval
from hpc_oialr.models.base import ModelConfig, attention_without_masks, stock_model


@dataclass(kw_only=True)
class ViT(ModelConfig):
    """``transformers.ViTForImageClassification``; the defaults are ViT-B/16. arXiv 2010.11929.

    Parameters
    ----------
    image_size, patch_size
        Side of the square image and of a patch (pixels).
    channels
        Colour channels.
    dim, depth, heads
        Width, layers and attention heads.
    mlp_ratio
        Width of the hidden layer of a block over ``dim``.
    classes
        Labels.
    dropout
        Probability, in hidden layers and attention.
    """

    pairs = (
        ColumnRowPair("*.attention", ("q_proj", "k_proj", "v_proj"), "o_proj", heads="num_attention_heads"),
        ColumnRowPair("*.mlp", ("fc1",), "fc2"),
    )

    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    classes: int = 1000
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self.check_at_least(1, "dim", "depth", "heads", "image_size", "patch_size", "classes", "channels")
        self.check_divides("image_size", "patch_size")
        self.check_divides("dim", "heads")
        if round(self.mlp_ratio * self.dim) < 1:
            rule = f"must leave a hidden layer of dim = {self.dim} a width"
            raise ConfigError("mlp_ratio", self.mlp_ratio, rule)
        check_interval("dropout", self.dropout, 0, 1, closed=(True, False))

    def build(self, example: Batch) -> nn.Module:
        """The model; the images must be of the given size and channels."""
        pixels = self.require_input(example, "pixel_values", "image")
        if tuple(pixels.shape[1:]) != (self.channels, self.image_size, self.image_size):
            wanted = f"must be the side of the data's images, which are {tuple(pixels.shape[1:])}"
            raise ConfigError("image_size", self.image_size, f"{wanted} (channels, height, width)")
        return stock_model(
            "ViTForImageClassification",
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_channels=self.channels,
            hidden_size=self.dim,
            num_hidden_layers=self.depth,
            num_attention_heads=self.heads,
            intermediate_size=round(self.mlp_ratio * self.dim),
            num_labels=self.classes,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
            attn_implementation=attention_without_masks(),
        )


@dataclass(kw_only=True)
class GPT2(ModelConfig):
    """``transformers.GPT2LMHeadModel`` with one token per byte value.

    Parameters
    ----------
    dim, depth, heads
        Width, layers and attention heads.
    vocabulary
        Tokens; 256 for bytes.
    dropout
        Probability, in embeddings, residuals and attention.
    """

    # The attention's q, k and v are one packed layer, whose blocks are not whole heads.
    pairs = (ColumnRowPair("*.mlp", ("c_fc",), "c_proj"),)

    dim: int = 768
    depth: int = 12
    heads: int = 12
    vocabulary: int = 256
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self.check_at_least(1, "dim", "depth", "heads", "vocabulary")
        self.check_divides("dim", "heads")
        check_interval("dropout", self.dropout, 0, 1, closed=(True, False))

    def build(self, example: Batch) -> nn.Module:
        """The model; its context is the data's sequence length."""
        tokens = self.require_input(example, "input_ids", "text")
        return stock_model(
            "GPT2LMHeadModel",
            vocab_size=self.vocabulary,
            n_positions=tokens.shape[1],
            n_embd=self.dim,
            n_layer=self.depth,
            n_head=self.heads,
            resid_pdrop=self.dropout,
            embd_pdrop=self.dropout,
            attn_pdrop=self.dropout,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
            attn_implementation=attention_without_masks(),
        )


@dataclass(kw_only=True)
class Llama(ModelConfig):
    """``transformers.LlamaForCausalLM``, its head tied to the embedding. arXiv 2302.13971.

    Parameters
    ----------
    dim, depth, heads
        Width, layers and attention heads.
    key_value_heads
        Heads of keys and values, each for ``heads / key_value_heads`` of the queries'; None = as many as queries'.
    mlp_dim
        Width of the hidden layer of a block.
    vocabulary
        Tokens.
    """

    pairs = (ColumnRowPair("*.mlp", ("gate_proj", "up_proj"), "down_proj"),)

    dim: int = 1024
    depth: int = 24
    heads: int = 16
    key_value_heads: int | None = None
    mlp_dim: int = 2816
    vocabulary: int = 32_000

    def __post_init__(self) -> None:
        self.check_at_least(1, "dim", "depth", "heads", "mlp_dim", "vocabulary")
        self.check_divides("dim", "heads")
        if self.key_value_heads is not None:
            self.check_at_least(1, "key_value_heads")
            self.check_divides("heads", "key_value_heads")

    def build(self, example: Batch) -> nn.Module:
        """The model; its context is the data's sequence length."""
        tokens = self.require_input(example, "input_ids", "text")
        return stock_model(
            "LlamaForCausalLM",
            vocab_size=self.vocabulary,
            max_position_embeddings=tokens.shape[1],
            hidden_size=self.dim,
            num_hidden_layers=self.depth,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads or self.heads,
            intermediate_size=self.mlp_dim,
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation=attention_without_masks(),
        )


@dataclass(kw_only=True)
class Autoformer(ModelConfig):
    """``transformers.AutoformerForPrediction``, a normal distribution at its end. arXiv 2106.13008.

    Unlike in the published code values and time features are embedded by one linear layer, each attention is followed by
    a layer norm, and the trend of the features is predicted too, which two linear layers turn into mean and width.

    Horizon, context, series and time features come from the data.

    Parameters
    ----------
    dim
        Width.
    encoder_layers, decoder_layers
        Layers.
    heads
        Attention heads of encoder and decoder.
    mlp_dim
        Width of the hidden layer of a block.
    lags
        How many steps back the value lies that each time step sees, those of the data's ``lags_sequence``; with
        ``[0]``, as published, its own: the decoder is given the context's values alone. From 1 on the network does not
        see the last value of the context.
    moving_average
        Window of the trend (time steps, odd).
    label_length
        Time steps of the context from which the decoder starts.
    dropout
        Probability, in hidden layers and attention.
    scaling
        How each window is scaled before the network and back after it: by "std" or "mean" of its context, or "none",
        as published.
    attention
        "published", or "transformers": as its modules compute it, where samples of a batch depend on each other (see
        :class:`~hpc_oialr.models.autoformer.AutoCorrelation`).
    initial
        Initial weights: "transformers", small ones everywhere, or "published": PyTorch's defaults, larger ones of the
        values' embedding, and forecasts that are the decoder's own values, where a random linear map of these would
        have to be unlearned first, for which the published learning rate is too small.
    """

    float64 = False

    dim: int = 512
    encoder_layers: int = 2
    decoder_layers: int = 1
    heads: int = 8
    mlp_dim: int = 2048
    lags: tuple[int, ...] = (1,)
    moving_average: int = 25
    label_length: int = 48
    dropout: float = 0.05
    scaling: Literal["std", "mean", "none"] = "std"
    attention: Literal["published", "transformers"] = "published"
    initial: Literal["transformers", "published"] = "transformers"

    def __post_init__(self) -> None:
        self.check_at_least(1, "dim", "encoder_layers", "decoder_layers", "heads", "mlp_dim")
        self.check_at_least(1, "moving_average", "label_length")
        self.check_divides("dim", "heads")
        check_interval("dropout", self.dropout, 0, 1, closed=(True, False))
        if not self.lags or min(self.lags) < 0:
            raise ConfigError("lags", self.lags, "must hold at least one whole number, none below 0")
        if self.moving_average % 2 == 0:
            raise ConfigError("moving_average", self.moving_average, "must be odd")

    def build(self, example: Batch) -> nn.Module:
        """The model for series and windows like those of ``example``."""
        past = self.require_input(example, "past_values", "time series")
        context = past.shape[1] - max(self.lags)
        if context < self.label_length:
            rule = f"must be at most {context}, the data's past of {past.shape[1]} time steps less the largest lag"
            raise ConfigError("label_length", self.label_length, rule)
        model = stock_model(
            "AutoformerForPrediction",
            prediction_length=example["future_values"].shape[1],
            context_length=context,
            input_size=1 if past.dim() == 2 else past.shape[2],
            num_time_features=example["past_time_features"].shape[2],
            distribution_output="normal",
            lags_sequence=list(self.lags),
            scaling=False if self.scaling == "none" else self.scaling,
            d_model=self.dim,
            encoder_layers=self.encoder_layers,
            decoder_layers=self.decoder_layers,
            encoder_attention_heads=self.heads,
            decoder_attention_heads=self.heads,
            encoder_ffn_dim=self.mlp_dim,
            decoder_ffn_dim=self.mlp_dim,
            dropout=self.dropout,
            attention_dropout=self.dropout,
            activation_dropout=self.dropout,
            encoder_layerdrop=0.0,
            decoder_layerdrop=0.0,
            label_length=self.label_length,
            moving_average=self.moving_average,
            use_cache=False,
        )
        if self.attention == "published":
            from hpc_oialr.models.autoformer import use_published_attention

            use_published_attention(model)
        if self.initial == "published":
            _start_as_published(model)
        return model


@torch.no_grad()
def _start_as_published(model: Any) -> None:
    """Initial weights of an ``AutoformerForPrediction`` as in the published code."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d):
            module.reset_parameters()
    for part in (model.model.encoder, model.model.decoder):
        nn.init.kaiming_normal_(part.value_embedding.value_projection.weight, mode="fan_in", nonlinearity="leaky_relu")
    mean, lags = model.parameter_projection.proj[0], len(model.config.lags_sequence)
    mean.weight.zero_()
    mean.bias.zero_()
    # The decoder's features begin with all lags of the first variable, then of the second.
    for variable in range(len(mean.weight)):
        mean.weight[variable, variable * lags] = 1.0
