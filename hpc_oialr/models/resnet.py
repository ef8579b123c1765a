"""Residual convolutional net."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import interpolate

from hpc_oialr.data.base import Batch
from hpc_oialr.errors import ConfigError
from hpc_oialr.models.base import ModelConfig, check_at_least, quiet_transformers, require_input


@dataclass(kw_only=True)
class ResNet(ModelConfig):
    """``transformers.ResNetForImageClassification``. arXiv 1512.03385.

    The stem of the stock class divides the resolution by 4, and each stage after the first by 2. Small
    images are therefore enlarged before the stem: 28 x 28 as 56 x 56 gives stages of 14 x 14, 7 x 7, 4 x 4.

    Parameters
    ----------
    image_size
        Side to which images are resized, bilinear (pixels); stored with the exported config.
    channels
        Colour channels.
    stem
        Filters of the stem.
    dims, depths
        Filters and blocks of each stage.
    block
        "basic" (two 3 x 3) or "bottleneck".
    classes
        Labels.
    """

    image_size: int = 224
    channels: int = 3
    stem: int = 64
    dims: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    block: Literal["basic", "bottleneck"] = "bottleneck"
    classes: int = 1000

    def __post_init__(self) -> None:
        check_at_least(1, stem=self.stem, classes=self.classes, channels=self.channels)
        if len(self.dims) != len(self.depths) or not self.dims:
            raise ConfigError("dims", self.dims, f"must have one entry for each of depths = {self.depths}")
        if min(*self.dims, *self.depths) < 1:
            raise ConfigError(
                "dims", self.dims, f"must, like depths = {self.depths}, hold numbers of at least 1"
            )
        least = 4 * 2 ** (len(self.dims) - 1)
        check_at_least(least, image_size=self.image_size)

    def build(self, example: Batch) -> nn.Module:
        """The model; the images must have the given channels, their size is adapted."""
        pixels = require_input(example, "pixel_values", "ResNet", "image")
        if pixels.shape[1] != self.channels:
            raise ConfigError(
                "channels", self.channels, f"must equal the data's, which have {pixels.shape[1]}"
            )
        quiet_transformers()
        from transformers import ResNetConfig, ResNetForImageClassification

        config = ResNetConfig(
            num_channels=self.channels,
            embedding_size=self.stem,
            hidden_sizes=list(self.dims),
            depths=list(self.depths),
            layer_type=self.block,
            num_labels=self.classes,
        )
        config.image_size = self.image_size
        model: nn.Module = ResNetForImageClassification(config)
        if pixels.shape[-1] != self.image_size:
            model.register_forward_pre_hook(Resize(self.image_size), with_kwargs=True)
        return model


class Resize:
    """Forward pre-hook that resizes ``pixel_values`` to a square of side ``size``.

    A hook leaves class and parameter names of the model as they are.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with ``pixel_values`` (B x C x size x size)."""
        pixels: Tensor = kwargs["pixel_values"]
        resized = interpolate(pixels, size=(self.size, self.size), mode="bilinear", align_corners=False)
        return args, {**kwargs, "pixel_values": resized}
