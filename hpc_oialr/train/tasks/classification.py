"""Classification of images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hpc_oialr.data.base import Batch
from hpc_oialr.errors import ConfigError, check_interval
from hpc_oialr.train.tasks.base import StepRNG, Task
from hpc_oialr.train.tasks.mixing import cutmix, mixup


@dataclass(kw_only=True)
class Classification(Task):
    """Cross-entropy; judged by accuracy, a share in [0, 1].

    Parameters
    ----------
    label_smoothing
        Share of the target that is spread over all classes.
    mixup, cutmix
        alpha of their Beta distributions; 0 = off. With both on, each batch draws one of them.
        Partners come from the same process's share of the batch.
    """

    inputs = ("pixel_values", "labels")
    outputs = "classes"
    metric = "accuracy"
    higher_is_better = True
    unit = "images"

    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        check_interval("label_smoothing", self.label_smoothing, 0, 1, closed=(True, False))
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ConfigError(name, getattr(self, name), "must not be negative")

    def loss(self, model: nn.Module, batch: Batch, rng: StepRNG) -> Tensor:
        """Mean cross-entropy of a batch with ``pixel_values`` (B x C x H x W) and ``labels`` (B)."""
        pixels, labels = batch["pixel_values"], batch["labels"]
        if not (self.mixup or self.cutmix):
            return self._cross_entropy(model(pixel_values=pixels).logits, labels)
        generator = rng.generator()
        if self.cutmix and (not self.mixup or generator.random() < 0.5):
            pixels, own = cutmix(pixels, generator, self.cutmix)
        else:
            pixels, own = mixup(pixels, generator, self.mixup)
        logits = model(pixel_values=pixels).logits
        return own * self._cross_entropy(logits, labels) + (1 - own) * self._cross_entropy(
            logits, labels.flip(0)
        )

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(_at_least_float32(logits), labels, label_smoothing=self.label_smoothing)

    def totals(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sum of the losses, number of right answers, number of images."""
        logits, labels = _at_least_float32(model(pixel_values=batch["pixel_values"]).logits), batch["labels"]
        right = (logits.argmax(-1) == labels).sum()
        loss = cross_entropy(logits, labels, reduction="sum")
        return torch.stack([loss.double(), right.double(), right.new_tensor(len(labels)).double()])

    def metrics(self, totals: Tensor) -> dict[str, float]:
        """``loss`` and ``accuracy``."""
        loss, right, count = totals.tolist()
        return {"loss": loss / count, "accuracy": right / count}

    def count(self, batch: Batch) -> int:
        """Images."""
        return len(batch["labels"])


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
