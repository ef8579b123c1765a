"""ResNet-RS from timm, or the ResNet of transformers where timm is not to be had."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from hpc_oialr.data.base import Batch
from hpc_oialr.errors import ConfigError, MissingExtraError, check_interval
from hpc_oialr.models.base import ModelConfig, check_at_least, quiet_transformers, require_input
from hpc_oialr.models.resnet import ResNet

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ResNetRS(ModelConfig):
    """timm's ``resnetrs101`` within ``transformers.TimmWrapperForImageClassification``. arXiv 2103.07579.

    The ResNet of transformers has the same blocks, but no squeeze and excitation, ResNet-D's stem or dropout.
    Which of the two a run trained is in its log and, as ``model``, in its ``summary.json``. Images of any
    size will do, in evaluation another one than in training.

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
        "timm" or "transformers"; "auto" takes timm where it can be imported.
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
        check_at_least(1, classes=self.classes, channels=self.channels)

    def build(self, example: Batch) -> nn.Module:
        """The model; the images must have the given channels.

        Raises
        ------
        MissingExtraError
            timm was asked for and cannot be imported.
        """
        size = require_input(example, "pixel_values", "ResNetRS", "image").shape[-1]
        reason = None if self.library == "transformers" else _why_no_timm()
        if reason is not None and self.library == "timm":
            raise MissingExtraError(f"timm ({reason})", "timm", purpose="model.library timm")
        if self.library == "transformers" or reason is not None:
            return self._transformers(example, size, reason)
        return self._timm()

    def _timm(self) -> nn.Module:
        quiet_transformers()
        from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

        arguments = {"layers": list(self.depths), "drop_rate": self.dropout, "in_chans": self.channels}
        config = TimmWrapperConfig(architecture="resnetrs101", num_labels=self.classes, model_args=arguments)
        model: Any = TimmWrapperForImageClassification(config)
        # transformers has drawn every weight anew, from one normal distribution.
        model.timm_model.init_weights(zero_init_last=True)
        log.info("the model is timm's resnetrs101")
        return model  # type: ignore[no-any-return]

    def _transformers(self, example: Batch, size: int, reason: str | None) -> nn.Module:
        if reason is not None:
            log.warning(
                "the model is transformers' ResNet, which has no squeeze and excitation, not ResNet-RS: timm cannot "
                "be imported (%s). Install it with: pip install 'hpc_oialr[timm]'; or choose: "
                "--model.library transformers",
                reason,
            )
        plain = ResNet(
            image_size=max(size, 32), channels=self.channels, depths=self.depths, classes=self.classes
        )
        return plain.build(example)


def _why_no_timm() -> str | None:
    """What importing timm raises, in one line; None if it can be imported.

    It needs torchvision, which fails in many ways where it was built for another torch.
    """
    try:
        importlib.import_module("timm")
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None
