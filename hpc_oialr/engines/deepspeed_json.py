"""A user's DeepSpeed JSON: read, compared with the recipe, and filled in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hpc_oialr.errors import ConfigError
from hpc_oialr.system_errors import read_json

HALF = ("bf16", "fp16")

# Settings that would change how parameters are stored or stepped.
_REFUSED = {
    "optimizer": "the recipe's optimizer is used",
    "scheduler": "the recipe's schedule is used",
    "amp": "train.precision is used",
    "torch_autocast": "train.precision is used",
    "tensor_parallel": "the engine TensorParallel splits layers",
    "compression_training": "OIALR replaces what it would compress",
    "zero_optimization.offload_optimizer": "optimizer state stays on the device",
    "zero_optimization.offload_param": "parameters stay on the device",
    "zero_optimization.zero_hpz_partition_size": "parameters have one partition",
    "zero_optimization.mics_shard_size": "parameters are sharded over all ranks",
    "zero_optimization.zero_quantized_weights": "masters must be kept exactly",
    "zero_optimization.zero_quantized_nontrainable_weights": "bases must be kept exactly",
}

# The part of a model in one buffer, where the JSON leaves its size open. DeepSpeed's defaults are for models of
# billions of parameters; a smaller model would fit whole into each buffer.
BUFFERS_IN_MODEL = 32
# It prefetches until this part of the model is gathered; without a bound it frees nothing before the backward pass.
LIVE_PARTS_IN_MODEL = 8


def read_config(path: str) -> dict[str, Any]:
    """Content of a DeepSpeed JSON; DataError if it cannot be read, :class:`ConfigError` if it is no JSON object."""
    content = read_json(Path(path))
    if not isinstance(content, dict):
        raise ConfigError("config", path, f"must hold a JSON object, not a {type(content).__name__}")
    return content


class ZeroConfig:
    """A DeepSpeed JSON that fits the run, or a :class:`ConfigError` that names the key.

    ``given`` is its content, ``precision`` the run's ("fp32", "bf16" or "fp16"), ``origin`` its path, for messages.
    """

    def __init__(self, given: dict[str, Any], precision: str, origin: str) -> None:
        self._given, self._precision, self._origin = given, precision, origin
        zero = given.get("zero_optimization", {})
        stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
        if stage not in (1, 2, 3):
            fix = "Without ZeRO take the engine DDP: it does the same."
            raise self._error("zero_optimization.stage", stage, "must be 1, 2 or 3", fix)
        self.stage = int(stage)
        for key, reason in _REFUSED.items():
            *section, name = key.split(".")
            value = (zero if section else given).get(name)
            if value not in (None, False, "auto") and not _is_off(value):
                raise self._error(key, value, f"must not be there: {reason}", "Remove it.")
        summed = given.get("data_types", {}).get("grad_accum_dtype", "auto")
        if precision == "bf16" and summed not in ("auto", None, "bf16") and self.stage == 1:
            rule = "must be bf16 in stage 1, which DeepSpeed replaces by another optimizer otherwise"
            raise self._error("data_types.grad_accum_dtype", summed, rule, "Take stage 2.")
        for name in HALF:
            enabled = given.get(name, {}).get("enabled", "auto")
            if enabled not in ("auto", precision == name):
                rule = f"must agree with train.precision, which is {precision}"
                fix = 'Write "auto", or change train.precision.'
                raise self._error(f"{name}.enabled", enabled, rule, fix)

    def _error(self, key: str, value: Any, rule: str, fix: str) -> ConfigError:
        return ConfigError(key, value, rule, origin=self._origin, fix=fix)

    def check_step(self, *, ranks: int, global_batch: int, accumulation: int, clip: float | None) -> None:
        """Raise :class:`ConfigError` unless batch sizes and clipping are the recipe's or "auto"."""
        share = f"train.global_batch / (train.accumulation x {ranks} ranks)"
        expected = {
            "train_batch_size": (global_batch, "train.global_batch"),
            "train_micro_batch_size_per_gpu": (global_batch // (ranks * accumulation), share),
            "gradient_accumulation_steps": (accumulation, "train.accumulation"),
            "gradient_clipping": (clip or 0.0, "train.gradient_clip"),
        }
        for key, (value, name) in expected.items():
            found = self._given.get(key, "auto")
            if found not in ("auto", value):
                rule = f"must be {value}, as {name} says"
                raise self._error(key, found, rule, 'Write "auto", or change the recipe.')

    def filled(self, *, trained: int, parameters: int) -> dict[str, Any]:
        """What DeepSpeed is given, without "auto", and with one backward pass a step.

        Accumulation and clipping are done by the engine. ``trained`` and ``parameters`` are the sizes of the model's
        trained parameters and of all, for :func:`sizes`.
        """
        content: dict[str, Any] = without_auto(self._given)
        zero: dict[str, Any] = sizes(trained, parameters, self.stage) | content["zero_optimization"]
        zero["reduce_bucket_size"] = max(1, min(int(zero["reduce_bucket_size"]), trained))
        content.pop("train_batch_size", None)
        for name in HALF:
            content[name] = {**content.get(name, {}), "enabled": self._precision == name}
        return content | {
            "zero_optimization": zero,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
        }


def _is_off(value: Any) -> bool:
    """Whether a section is disabled, or a size is DeepSpeed's neutral one."""
    if isinstance(value, dict):
        return value.get("enabled") is False or value.get("device") == "none"
    return value in (1, -1) and value is not True


def sizes(trained: int, parameters: int, stage: int) -> dict[str, int]:
    """Sizes of buffers in numbers, in proportion to the model, at most DeepSpeed's own.

    The gradient buffer is 1/32 of the gradients; stage 3 prefetches or keeps 1/32 of the model, until 1/8 is gathered;
    parameters of at most ``sqrt(parameters)`` numbers, i.e. biases and norms, stay gathered.

    Examples
    --------
    >>> sizes(6400, 10_000, 2)
    {'reduce_bucket_size': 200}
    """
    found = {"reduce_bucket_size": min(500_000_000, trained // BUFFERS_IN_MODEL)}
    if stage < 3:
        return found
    return found | {
        "stage3_prefetch_bucket_size": min(50_000_000, parameters // BUFFERS_IN_MODEL),
        "stage3_max_reuse_distance": min(1_000_000_000, parameters // BUFFERS_IN_MODEL),
        "stage3_max_live_parameters": min(1_000_000_000, parameters // LIVE_PARTS_IN_MODEL),
        "stage3_param_persistence_threshold": min(100_000, math.isqrt(parameters)),
    }


def without_auto(value: Any) -> Any:
    """Drop keys whose value is "auto", so that :func:`sizes` or DeepSpeed sets them."""
    if isinstance(value, dict):
        return {key: without_auto(item) for key, item in value.items() if item != "auto"}
    return value
