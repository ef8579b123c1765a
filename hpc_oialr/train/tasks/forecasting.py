"""Forecasting of time series."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpc_oialr.data.base import Batch
from hpc_oialr.train.tasks.base import StepRNG, Task

INPUTS = (
    "past_values",
    "past_time_features",
    "past_observed_mask",
    "future_values",
    "future_time_features",
    "future_observed_mask",
)


@dataclass(kw_only=True)
class Forecasting(Task):
    """Likelihood of the future under the predicted distribution; judged by the MSE of its mean.

    The MSE is in the units of the data, which are standardised. The model's predictions do not
    depend on ``future_values``, which only the likelihood needs; so no sampling is done.
    """

    inputs = ("past_values", "future_values", "future_observed_mask")
    metric = "mse"
    higher_is_better = False
    unit = "windows"

    def loss(self, model: nn.Module, batch: Batch, rng: StepRNG) -> Tensor:
        """Mean negative log-likelihood."""
        loss: Tensor = _forward(model, batch).loss
        return loss

    def totals(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sums over the observed values of loss, squared error and absolute error, and their number."""
        outputs, future = _forward(model, batch), batch["future_values"]
        observed = batch["future_observed_mask"].double()
        error = (mean_prediction(model, outputs) - future).double() * observed
        count = observed.sum()
        return torch.stack([outputs.loss.double() * count, error.square().sum(), error.abs().sum(), count])

    def metrics(self, totals: Tensor) -> dict[str, float]:
        """``loss`` (nats), ``mse`` and ``mae``."""
        loss, squares, absolutes, count = totals.tolist()
        return {"loss": loss / count, "mse": squares / count, "mae": absolutes / count}

    def count(self, batch: Batch) -> int:
        """Windows."""
        return len(batch["future_values"])


def _forward(model: nn.Module, batch: Batch) -> Any:
    return model(**{key: batch[key] for key in INPUTS if key in batch})


def mean_prediction(model: Any, outputs: Any) -> Tensor:
    """Mean of the predicted distribution (B x horizon, x series where there are several)."""
    distribution = model.output_distribution(outputs.params, loc=outputs.loc, scale=outputs.scale)
    mean: Tensor = distribution.mean
    return mean
