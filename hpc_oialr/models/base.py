"""What every model setting offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from hpc_oialr.data.base import Batch
from hpc_oialr.engines.tensor.pairs import ColumnRowPair
from hpc_oialr.errors import ConfigError


class ModelConfig(ABC):
    """Settings of one model; a choice of model is a choice of type.

    Attributes
    ----------
    float64
        Whether the model can compute in float64 throughout.
    pairs
        Layers between which features may stay split over processes.
    """

    float64: ClassVar[bool] = True
    pairs: ClassVar[tuple[ColumnRowPair, ...]] = ()

    @abstractmethod
    def build(self, example: Batch) -> nn.Module:
        """The model with fresh weights from torch's global generator.

        Parameters
        ----------
        example
            A batch of at least one sample; the model takes from it what the data decide.

        Raises
        ------
        ConfigError
            If the settings do not fit the data.
        """


def quiet_transformers() -> None:
    """Keep transformers' progress bars and advice out of a run's log."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def check_divides(name: str, value: int, divisor_name: str, divisor: int) -> None:
    """Raise :class:`ConfigError` unless ``divisor`` divides ``value``."""
    if divisor < 1 or value % divisor:
        raise ConfigError(name, value, f"must be a multiple of {divisor_name} = {divisor}")


def check_at_least(low: int, **values: int) -> None:
    """Raise :class:`ConfigError` for the first of ``values`` below ``low``."""
    for name, value in values.items():
        if value < low:
            raise ConfigError(name, value, f"must be at least {low}")


def require_input(example: Batch, key: str, model: str, data: str) -> Tensor:
    """The input ``key`` of ``example``, or a :class:`ConfigError` that names the data a model wants."""
    if key not in example:
        held = ", ".join(sorted(example))
        rule = f"needs batches with {key!r}; the data give {held}"
        raise ConfigError("class_path", model, rule, fix=f"Choose {data} data, or another model.")
    return example[key]
