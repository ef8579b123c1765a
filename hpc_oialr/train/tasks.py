"""Tasks: loss, metric, and the sums from which the metric is computed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hpc_oialr.data.base import Batch
from hpc_oialr.errors import ConfigError, check_interval
from hpc_oialr.train.chunked_loss import next_token_loss


class Task(ABC):
    """Settings of one task; a subclass is a task."""

    inputs: ClassVar[tuple[str, ...]]  # what a batch must hold
    outputs: ClassVar[str | None] = None  # the model's setting that is its number of labels or tokens
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]
    unit: ClassVar[str]  # what count() counts
    # Whether loss() uses its rng, or anything else that the host decides anew in each step: a CUDA graph cannot hold it.
    draws: bool = True

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, rng: np.random.Generator) -> Tensor:
        """Training loss, the mean over the samples of ``batch``; a scalar with a graph.

        ``rng`` is made from the run's seed, the step, and the part of an accumulated step; it is equal on all ranks.
        """

    @abstractmethod
    def totals(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sums over ``batch`` that :meth:`metrics` divides; float64, the count last."""

    @abstractmethod
    def metrics(self, totals: Tensor) -> dict[str, float]:
        """``loss`` and the metric, from the sums over a data set."""

    def served(self, batch: Batch) -> tuple[str, ...]:
        """What of ``batch`` a trained model needs to answer; by default the first of :attr:`inputs`."""
        return self.inputs[:1]

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's answer, from :meth:`served` alone; by default its logits."""
        logits: Tensor = model(**{name: batch[name] for name in self.served(batch)}).logits
        return logits

    def count(self, batch: Batch) -> int:
        """How many units a batch holds; by default its samples."""
        return len(batch[self.inputs[0]])

    def check(self, example: Batch, classes: int | None, model: object) -> None:
        """Raise :class:`ConfigError` unless a batch, the data's number of labels or tokens, and model settings fit."""
        if missing := [key for key in self.inputs if key not in example]:
            rule = f"needs batches with {missing[0]!r}; the data give {', '.join(sorted(example))}"
            fix = "Choose the task that belongs to the data."
            raise ConfigError("task", type(self).__name__, rule, fix=fix)
        chosen = getattr(model, self.outputs, None) if self.outputs else None
        if chosen is not None and classes is not None and chosen < classes:
            rule = f"must be at least {classes}: the data have that many"
            raise ConfigError(f"model.{self.outputs}", chosen, rule)

    def better(self, value: float, best: float | None) -> bool:
        """Whether ``value`` is better than ``best``."""
        return best is None or (value > best if self.higher_is_better else value < best)


@dataclass(kw_only=True)
class Classification(Task):
    """Cross-entropy of images; the metric is accuracy in [0, 1].

    Parameters
    ----------
    label_smoothing
        Share of the target that is spread over all classes.
    mixup, cutmix
        alpha of their Beta distributions; 0 = off. With both on, each batch draws one of them.
        Partners come from the same rank's share of the batch.
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
        self.draws = bool(self.mixup or self.cutmix)

    def loss(self, model: nn.Module, batch: Batch, rng: np.random.Generator) -> Tensor:
        """Mean cross-entropy of a batch with ``pixel_values`` (B x C x H x W) and ``labels`` (B)."""
        pixels, labels = batch["pixel_values"], batch["labels"]
        if not (self.mixup or self.cutmix):
            return self._cross_entropy(model(pixel_values=pixels).logits, labels)
        if self.cutmix and (not self.mixup or rng.random() < 0.5):
            pixels, own = cutmix(pixels, rng, self.cutmix)
        else:
            pixels, own = mixup(pixels, rng, self.mixup)
        logits = model(pixel_values=pixels).logits
        own_loss, partner_loss = (self._cross_entropy(logits, y) for y in (labels, labels.flip(0)))
        return own * own_loss + (1 - own) * partner_loss

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(_at_least_fp32(logits), labels, label_smoothing=self.label_smoothing)

    def totals(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sum of the losses, right answers, those among the first five (NaN for five classes or fewer), images."""
        return _label_totals(model(pixel_values=batch["pixel_values"]).logits, batch["labels"])

    def metrics(self, totals: Tensor) -> dict[str, float]:
        """``loss``, ``accuracy`` and, for more than five classes, ``top5_accuracy``."""
        return _label_metrics(totals)


@dataclass(kw_only=True)
class TextClassification(Task):
    """Cross-entropy of texts; the metric is accuracy in [0, 1].

    Parameters
    ----------
    label_smoothing
        Share of the target that is spread over all classes.
    """

    inputs = ("input_ids", "attention_mask", "labels")
    outputs = "classes"
    metric = "accuracy"
    higher_is_better = True
    unit = "texts"
    draws = False

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_interval("label_smoothing", self.label_smoothing, 0, 1, closed=(True, False))

    def loss(self, model: nn.Module, batch: Batch, rng: np.random.Generator) -> Tensor:
        """Mean cross-entropy of a batch with ``input_ids``, ``attention_mask`` (B x T) and ``labels`` (B)."""
        logits = _at_least_fp32(self.predict(model, batch))
        return cross_entropy(logits, batch["labels"], label_smoothing=self.label_smoothing)

    def totals(self, model: nn.Module, batch: Batch) -> Tensor:
        """As of :class:`Classification`, of texts."""
        return _label_totals(self.predict(model, batch), batch["labels"])

    def metrics(self, totals: Tensor) -> dict[str, float]:
        """``loss``, ``accuracy`` and, for more than five classes, ``top5_accuracy``."""
        return _label_metrics(totals)

    def served(self, batch: Batch) -> tuple[str, ...]:
        """Tokens and their mask."""
        return self.inputs[:2]


def _label_totals(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the losses, right answers, those among the first five (NaN for five classes or fewer), samples."""
    logits = _at_least_fp32(logits)
    right = (logits.argmax(-1) == labels).sum().double()
    loss = cross_entropy(logits, labels, reduction="sum").double()
    among = right * math.nan
    if logits.shape[-1] > 5:
        among = (logits.topk(5).indices == labels[:, None]).sum().double()
    return torch.stack([loss, right, among, right.new_tensor(len(labels))])


def _label_metrics(totals: Tensor) -> dict[str, float]:
    loss, right, among, count = totals.tolist()
    found = {"loss": loss / count, "accuracy": right / count}
    return found if math.isnan(among) else {**found, "top5_accuracy": among / count}


def mixup(pixels: Tensor, generator: np.random.Generator, alpha: float) -> tuple[Tensor, float]:
    """``lam x + (1 - lam) x'`` and lam, drawn from Beta(alpha, alpha). arXiv 1710.09412.

    ``pixels`` is B x C x H x W; the partner x' is the same batch in reverse order.
    """
    lam = float(generator.beta(alpha, alpha))
    return torch.lerp(pixels.flip(0), pixels, lam), lam


def cutmix(pixels: Tensor, generator: np.random.Generator, alpha: float) -> tuple[Tensor, float]:
    """A rectangle of about 1 - lam of the area comes from the partner; returns the exact share that does not.

    arXiv 1905.04899; otherwise as :func:`mixup`.
    """
    height, width = pixels.shape[-2:]
    side = (1 - float(generator.beta(alpha, alpha))) ** 0.5

    def span(size: int) -> tuple[int, int]:
        """An interval of about ``side * size`` around a random centre, cut at the borders."""
        centre, half = int(generator.integers(size)), round(side * size / 2)
        return max(0, centre - half), min(size, centre + half)

    (top, bottom), (left, right) = span(height), span(width)
    mixed = pixels.clone()
    mixed[..., top:bottom, left:right] = pixels.flip(0)[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


@dataclass(kw_only=True)
class Forecasting(Task):
    """Forecasts of the future; the metric is the MSE of the predicted distribution's mean.

    The MSE is that of standardised data. Predictions do not depend on ``future_values``, which only the likelihood
    needs; so no sampling is done.

    Parameters
    ----------
    objective
        What is minimised: "likelihood", the negative log-likelihood of the predicted distribution, or "mse", that of its
        mean over the observed values; its width is then not trained.
    """

    inputs = ("past_values", "future_values", "future_observed_mask")
    optional_inputs = ("past_time_features", "past_observed_mask", "future_time_features")
    metric = "mse"
    higher_is_better = False
    unit = "windows"
    draws = False

    objective: Literal["likelihood", "mse"] = "likelihood"

    def loss(self, model: nn.Module, batch: Batch, rng: np.random.Generator) -> Tensor:
        """Mean negative log-likelihood or mean squared error, a scalar."""
        outputs = self._forward(model, batch)
        if self.objective == "likelihood":
            loss: Tensor = outputs.loss
            return loss
        # The mean of a normal distribution, without its object, which a wrapped model does not give.
        mean: Tensor
        width: Tensor
        mean, width = outputs.params
        observed = batch["future_observed_mask"]
        error = (outputs.loc + outputs.scale * mean - batch["future_values"]) * observed
        # The width has a gradient, of zeros: DDP waits for one of every parameter.
        mean_error: Tensor = error.square().sum() / observed.sum().clamp_min(1)
        return mean_error + 0.0 * width.sum()

    def totals(self, model: Any, batch: Batch) -> Tensor:
        """Sums over the observed values of loss, squared error and absolute error, and their number."""
        outputs, observed = self._forward(model, batch), batch["future_observed_mask"].double()
        predicted = model.output_distribution(outputs.params, loc=outputs.loc, scale=outputs.scale).mean
        error = (predicted - batch["future_values"]).double() * observed
        count = observed.sum()
        return torch.stack([outputs.loss.double() * count, error.square().sum(), error.abs().sum(), count])

    def served(self, batch: Batch) -> tuple[str, ...]:
        """The past, and what is known of the future."""
        return tuple(name for name in ("past_values", *self.optional_inputs) if name in batch)

    def predict(self, model: Any, batch: Batch) -> Tensor:
        """The mean of the predicted distribution, as the future values."""
        # A zero future stands in for the unknown one: the parameters do not depend on it, only the likelihood does.
        past, known = batch["past_values"], batch["future_time_features"]
        future = past.new_zeros(past.shape[0], known.shape[1], *past.shape[2:])
        given = {name: batch[name] for name in self.served(batch)}
        outputs = model(**given, future_values=future, future_observed_mask=torch.ones_like(future))
        mean: Tensor = model.output_distribution(outputs.params, loc=outputs.loc, scale=outputs.scale).mean
        return mean

    def _forward(self, model: nn.Module, batch: Batch) -> Any:
        names = (*self.inputs, *self.optional_inputs)
        return model(**{name: batch[name] for name in names if name in batch})

    def metrics(self, totals: Tensor) -> dict[str, float]:
        """``loss`` (nats), ``mse`` and ``mae``."""
        loss, squares, absolutes, count = totals.tolist()
        return {"loss": loss / count, "mse": squares / count, "mae": absolutes / count}


@dataclass(kw_only=True)
class LanguageModelling(Task):
    """Cross-entropy of the next token; the metric is bits per byte of text.

    Parameters
    ----------
    bytes_per_token
        Bytes of text that a token stands for on average: 1 where tokens are bytes; ``oialr data tokenize`` says it.
    loss_chunk
        Tokens of which the logits exist at a time, of GPT-2 and Llama; "auto" = as many as make 2^26 logits where the
        vocabulary has at least 32,768 tokens, all elsewhere; null = all.
    """

    inputs = ("input_ids", "labels")
    outputs = "vocabulary"
    metric = "bits_per_byte"
    higher_is_better = False
    unit = "tokens"
    draws = False

    loss_chunk: int | Literal["auto"] | None = "auto"
    bytes_per_token: float = 1.0

    def __post_init__(self) -> None:
        if not self.bytes_per_token > 0:
            raise ConfigError("bytes_per_token", self.bytes_per_token, "must be positive")
        if isinstance(self.loss_chunk, int) and self.loss_chunk < 1:
            raise ConfigError("loss_chunk", self.loss_chunk, "must be at least 1")

    def loss(self, model: nn.Module, batch: Batch, rng: np.random.Generator) -> Tensor:
        """Mean cross-entropy of a batch with ``input_ids`` and ``labels`` (B x T), in nats."""
        if (summed := next_token_loss(model, batch, self.loss_chunk)) is not None:
            return summed / batch["labels"][:, 1:].numel()
        return cross_entropy(*self._predictions(model, batch))

    def totals(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sum of the losses and number of predicted bytes."""
        loss = next_token_loss(model, batch, self.loss_chunk)
        if loss is None:
            loss = cross_entropy(*self._predictions(model, batch), reduction="sum")
        return torch.stack([loss.double(), loss.new_tensor(batch["labels"][:, 1:].numel()).double()])

    def _predictions(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (N x V) and the bytes they predict (N): as in transformers, labels are not shifted."""
        logits = _at_least_fp32(model(input_ids=batch["input_ids"]).logits)
        return logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()

    def metrics(self, totals: Tensor) -> dict[str, float]:
        """``loss`` (nats) and ``perplexity`` of a token, and ``bits_per_byte``."""
        total, count = totals.tolist()
        loss = total / count
        bits = loss / math.log(2) / self.bytes_per_token
        return {"loss": loss, "bits_per_byte": bits, "perplexity": math.exp(min(loss, 700.0))}

    def count(self, batch: Batch) -> int:
        """Tokens."""
        return batch["input_ids"].numel()


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
