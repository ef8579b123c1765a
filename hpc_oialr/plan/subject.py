"""What is planned: a recipe, what a sample of its data looks like, and how many there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hpc_oialr.data import ArrayDataset, Batch, DataConfig, Splits
from hpc_oialr.data.draws import Draw
from hpc_oialr.errors import ConfigError, DataError
from hpc_oialr.train.config import RunConfig

# Training samples of data sets that a machine for planning seldom has.
KNOWN_SAMPLES = {"ImageFolder": 1_281_167, "CIFAR10": 50_000, "FashionMNIST": 60_000}


@dataclass(frozen=True)
class Form:
    """One tensor of a batch: its shape without the first axis, and its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Subject:
    """A recipe and the form of its data.

    Attributes
    ----------
    config
        The recipe's settings.
    forms
        Of every tensor of a batch.
    samples
        Of the training data.
    assumption
        What was assumed of the data, if they are not here.
    """

    config: RunConfig
    forms: Mapping[str, Form]
    samples: int
    assumption: str | None = None

    @classmethod
    def of(cls, config: RunConfig, samples: int | None = None) -> Subject:
        """Look at the data, or, where they are not here, at what the settings say of them.

        Parameters
        ----------
        samples
            Of the training data; default those that are here, or ``KNOWN_SAMPLES``.

        Raises
        ------
        DataError
            If the data are not here, and neither the settings nor ``samples`` tell enough.
        """
        try:
            train = config.data.build().train
        except DataError as missing:
            return cls._of_settings(config, samples, missing)
        batch = train.gather(torch.arange(1))
        forms = {key: Form(tuple(value.shape[1:]), value.dtype) for key, value in batch.items()}
        return cls(config, forms, samples or len(train))

    @classmethod
    def _of_settings(cls, config: RunConfig, samples: int | None, missing: DataError) -> Subject:
        kind = type(config.data).__name__
        forms, count = _described(config.data), samples or KNOWN_SAMPLES.get(kind)
        if forms is None:
            raise missing
        if count is None:
            raise DataError(f"{missing} Or say how many training samples there are: --samples N")
        if config.data.limit is not None:
            count = min(count, config.data.limit)
        return cls(config, forms, count, f"the data are not here: {count:,} training samples")

    def with_batch(self, global_batch: int) -> Subject:
        """The same with another global batch."""
        train = replace(self.config.train, global_batch=global_batch)
        return replace(self, config=replace(self.config, train=train))

    @property
    def total_steps(self) -> int:
        """Of the whole run.

        Raises
        ------
        ConfigError
            If there are fewer samples than a global batch holds.
        """
        train = self.config.train
        if self.samples < train.global_batch:
            rule = f"must not exceed the {self.samples} samples of the data set"
            raise ConfigError("train.global_batch", train.global_batch, rule)
        return train.total_steps(self.samples // train.global_batch)

    def batch(self, size: int) -> Batch:
        """A batch of this form with made-up values: noise, and 0 for every label."""
        double = self.config.train.precision == "float64"
        return {key: _made_up(form, size, double) for key, form in self.forms.items()}


def _made_up(form: Form, size: int, double: bool) -> Tensor:
    if not form.dtype.is_floating_point:
        return torch.zeros(size, *form.shape, dtype=form.dtype)
    return torch.randn(size, *form.shape, dtype=torch.float64 if double else form.dtype)


def _described(data: DataConfig) -> dict[str, Form] | None:
    """Forms by what settings of the package's image and text data say; None for others."""
    length = getattr(data, "sequence_length", None)
    if length is not None:
        tokens = Form((length,), torch.int64)
        return {"input_ids": tokens, "labels": tokens}
    side = getattr(data, "size", getattr(data, "image_size", None))
    if side is None:
        return None
    channels = getattr(data, "num_channels", 3)
    return {
        "pixel_values": Form((channels, side, side), torch.float32),
        "labels": Form((), torch.int64),
    }


@dataclass(frozen=True)
class Blank:
    """Data of a subject's form with made-up values, in the place of data settings; no recipe can choose it."""

    subject: Subject
    count: int

    def build(self) -> Splits:
        """``count`` samples for training, as many for validation."""
        samples = _Blanks(self.subject, self.count)
        return Splits(samples, samples, None)


class _Blanks(ArrayDataset):
    def __init__(self, subject: Subject, count: int) -> None:
        self.subject, self.count = subject, count

    def __len__(self) -> int:
        return self.count

    def gather(self, indices: Tensor, draw: Draw | None = None) -> Batch:
        return self.subject.batch(len(indices))
