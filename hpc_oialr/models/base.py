"""Base class of all model settings."""

from __future__ import annotations

import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

from torch import Tensor, nn

from hpc_oialr.data.base import Batch
from hpc_oialr.engines.tensor.pairs import ColumnRowPair
from hpc_oialr.errors import ConfigError
from hpc_oialr.garbage import search_as_usual


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


def prepare_transformers() -> None:
    """Import transformers, and keep its progress bars and advice out of a run's log."""
    from transformers.utils import import_utils, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if "transformers.modeling_utils" not in sys.modules:
        with _models_listed_once(import_utils):
            importlib.import_module("transformers.modeling_utils")
    search_as_usual()


@contextmanager
def _models_listed_once(import_utils: Any) -> Iterator[None]:
    """Keep transformers from reading the 1,700 files of its models twice.

    It reads them for the names in them when it is imported, and again when the first model is: its cache knows the
    folder by another name. Without that function nothing happens.
    """
    read = getattr(import_utils, "create_import_structure_from_path", None)
    if read is None:
        yield
        return
    models = Path(import_utils.__file__).parents[1] / "models"

    def read_once(path: Any) -> Any:
        return read(models if Path(path) == models / "__init__.py" else path)

    with patch.object(import_utils, "create_import_structure_from_path", read_once):
        yield


def attention_without_masks() -> str:
    """Name of an attention like transformers' "sdpa", for models that are given no mask: causal where the model is.

    By its own name transformers looks at positions for packed sequences, which waits for a GPU in every step, and during
    the capture of a CUDA graph it builds masks that nothing needs, which keep attention off its fast kernels.
    """
    prepare_transformers()
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # A name that transformers has no masks for.
    name = "sdpa_without_mask"
    AttentionInterface.register(name, sdpa_attention_forward)
    return name


def stock_model(name: str, **settings: Any) -> nn.Module:
    """The class ``name`` of transformers with fresh weights, from ``settings`` of its config."""
    prepare_transformers()
    import transformers

    kind = getattr(transformers, name)
    model: nn.Module = kind(kind.config_class(**settings))
    return model
