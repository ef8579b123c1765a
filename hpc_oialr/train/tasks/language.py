"""Language modelling on bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hpc_oialr.data.base import Batch
from hpc_oialr.train.tasks.base import StepRNG, Task


@dataclass(kw_only=True)
class LanguageModelling(Task):
    """Cross-entropy of the next byte; judged by bits per byte."""

    inputs = ("input_ids", "labels")
    outputs = "vocabulary"
    metric = "bits_per_byte"
    higher_is_better = False
    unit = "tokens"

    def loss(self, model: nn.Module, batch: Batch, rng: StepRNG) -> Tensor:
        """Mean cross-entropy of a batch with ``input_ids`` and ``labels`` (B x T), in nats."""
        logits, targets = _predictions(model, batch)
        return cross_entropy(logits, targets)

    def totals(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sum of the losses and number of predicted bytes."""
        logits, targets = _predictions(model, batch)
        loss = cross_entropy(logits, targets, reduction="sum").double()
        return torch.stack([loss, loss.new_tensor(targets.numel())])

    def metrics(self, totals: Tensor) -> dict[str, float]:
        """``loss`` (nats), ``bits_per_byte`` and ``perplexity``."""
        total, count = totals.tolist()
        loss = total / count
        return {"loss": loss, "bits_per_byte": loss / math.log(2), "perplexity": math.exp(min(loss, 700.0))}

    def count(self, batch: Batch) -> int:
        """Tokens."""
        return batch["input_ids"].numel()


def _predictions(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (N x V) and the bytes they are to predict (N): as in transformers, labels are not shifted."""
    logits: Tensor = model(input_ids=batch["input_ids"]).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
