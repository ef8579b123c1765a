"""Base class of all model settings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from hpc_oialr.data.base import Batch
from hpc_oialr.engines.tensor.pairs import ColumnRowPair
from hpc_oialr.errors import ConfigError


class ModelConfig(ABC):
    """Settings of one model; a choice of model is a choice of type."""

    float64: ClassVar[bool] = True  # whether it computes in its parameters' dtype throughout
    pairs: ClassVar[tuple[ColumnRowPair, ...]] = ()  # layers between which features may stay sharded

    @abstractmethod
    def build(self, example: Batch) -> nn.Module:
        """The model, initialised from torch's global generator, for data like the batch ``example``.

        Raises :class:`ConfigError` if the settings do not fit ``example``.
        """

    def check_at_least(self, low: int, *names: str) -> None:
        """Raise :class:`ConfigError` for the first of these settings below ``low``."""
        for name in names:
            if getattr(self, name) < low:
                raise ConfigError(name, getattr(self, name), f"must be at least {low}")

    def check_divides(self, name: str, divisor: str) -> None:
        """Raise :class:`ConfigError` unless the setting ``divisor`` divides the setting ``name``."""
        value, by = getattr(self, name), getattr(self, divisor)
        if by < 1 or value % by:
            raise ConfigError(name, value, f"must be a multiple of {divisor} = {by}")

    def require_input(self, example: Batch, key: str, data: str) -> Tensor:
        """The input ``key`` of ``example``, or a :class:`ConfigError` that names the data the model needs."""
        if key not in example:
            held = ", ".join(sorted(example))
            rule = f"needs batches with {key!r}; the data give {held}"
            fix = f"Choose {data} data, or another model."
            raise ConfigError("class_path", type(self).__name__, rule, fix=fix)
        return example[key]


def quiet_transformers() -> None:
    """Keep transformers' progress bars and advice out of a run's log."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def attention_without_masks() -> str:
    """Name of an attention like transformers' "sdpa", for models that are given no mask: causal where the model is.

    By its own name transformers looks at positions for packed sequences, which waits for a GPU in every step, and during
    the capture of a CUDA graph it builds masks that nothing needs, which keep attention off its fast kernels.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # A name that transformers has no masks for.
    name = "sdpa_without_mask"
    AttentionInterface.register(name, sdpa_attention_forward)
    return name


def stock_model(name: str, **settings: Any) -> nn.Module:
    """The class ``name`` of transformers with fresh weights, from ``settings`` of its config."""
    quiet_transformers()
    import transformers

    kind = getattr(transformers, name)
    model: nn.Module = kind(kind.config_class(**settings))
    return model
