"""Residual convolutional nets: the ResNet of transformers, and ResNet-RS from timm."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import interpolate

from hpc_oialr.data.base import Batch
from hpc_oialr.errors import ConfigError, MissingExtraError, check_interval
from hpc_oialr.models.base import ModelConfig, prepare_transformers, stock_model

log = logging.getLogger(__name__)


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
        self.check_at_least(1, "stem", "classes", "channels")
        if len(self.dims) != len(self.depths) or not self.dims:
            raise ConfigError("dims", self.dims, f"must have one entry for each of depths = {self.depths}")
        if min(*self.dims, *self.depths) < 1:
            raise ConfigError("dims", self.dims, f"must, like depths = {self.depths}, hold numbers of at least 1")
        self.check_at_least(4 * 2 ** (len(self.dims) - 1), "image_size")

    def build(self, example: Batch) -> nn.Module:
        """The model; the images must have the given channels, their size is adapted."""
        pixels = self.require_input(example, "pixel_values", "image")
        if pixels.shape[1] != self.channels:
            rule = f"must equal the data's, which have {pixels.shape[1]}"
            raise ConfigError("channels", self.channels, rule)
        model = stock_model(
            "ResNetForImageClassification",
            num_channels=self.channels,
            embedding_size=self.stem,
            hidden_sizes=list(self.dims),
            depths=list(self.depths),
            layer_type=self.block,
            num_labels=self.classes,
            image_size=self.image_size,
        )
        if pixels.shape[-1] != self.image_size:
            model.register_forward_pre_hook(partial(resize, size=self.image_size), with_kwargs=True)
        return model


def resize(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, size: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook that resizes ``pixel_values`` to a square; class and parameter names stay as they are."""
    pixels: Tensor = kwargs["pixel_values"]
    resized = interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    return args, {**kwargs, "pixel_values": resized}


@dataclass(kw_only=True)
class ResNetRS(ModelConfig):
    """timm's ``resnetrs101`` within ``transformers.TimmWrapperForImageClassification``. arXiv 2103.07579.

    The ResNet of transformers has the same blocks, but no squeeze and excitation, ResNet-D's stem or dropout.
    Which of the two a run trained is in its log and, as ``model``, in its ``summary.json``. Images may
    have any size, in evaluation another one than in training.

    Parameters
    ----------
    depths
        Blocks of each stage.
    dropout
        Probability, before the classifier; timm's only.
    channels
        Colour channels.
    classes
        Labels.
    library
        "timm", or "transformers" for the other network, which must be asked for; "auto" is "timm".
    """

    depths: tuple[int, ...] = (3, 4, 23, 3)
    dropout: float = 0.25
    channels: int = 3
    classes: int = 1000
    library: Literal["auto", "timm", "transformers"] = "auto"

    def __post_init__(self) -> None:
        if len(self.depths) != 4 or min(self.depths) < 1:
            raise ConfigError("depths", self.depths, "must be four numbers of at least 1")
        check_interval("dropout", self.dropout, 0, 1, closed=(True, False))
        self.check_at_least(1, "classes", "channels")

    def build(self, example: Batch) -> nn.Module:
        """The model; the images must have the given channels.

        Raises :class:`MissingExtraError` if timm cannot be imported: the other network is trained only if it is named.
        """
        size = max(32, self.require_input(example, "pixel_values", "image").shape[-1])
        plain = ResNet(image_size=size, channels=self.channels, depths=self.depths, classes=self.classes)
        if self.library == "transformers":
            return plain.build(example)
        try:
            importlib.import_module("timm")
        except Exception as error:
            # It needs torchvision, which fails in many ways where it was built for another torch.
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            other = "or train transformers' ResNet, another network: --model.library transformers"
            raise MissingExtraError(f"timm ({reason})", "timm", purpose=f"ResNetRS ({other})") from error
        prepare_transformers()
        from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

        arguments = {"layers": list(self.depths), "drop_rate": self.dropout, "in_chans": self.channels}
        config = TimmWrapperConfig(architecture="resnetrs101", num_labels=self.classes, model_args=arguments)
        model: Any = TimmWrapperForImageClassification(config)
        # transformers has initialised every weight again, from one normal distribution.
        model.timm_model.init_weights(zero_init_last=True)
        log.info("the model is timm's resnetrs101")
        return model  # type: ignore[no-any-return]
