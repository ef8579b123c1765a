"""Vision transformer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hpc_oialr.data.base import Batch
from hpc_oialr.engines.tensor.pairs import ColumnRowPair
from hpc_oialr.errors import ConfigError, check_interval
from hpc_oialr.models.base import ModelConfig, stock_model


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
            raise ConfigError(
                "mlp_ratio", self.mlp_ratio, f"must leave a hidden layer of dim = {self.dim} a width"
            )
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
            attn_implementation="sdpa",
        )
