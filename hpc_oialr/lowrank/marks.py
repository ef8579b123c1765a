"""What users hang onto a parameter: hooks of its gradient, and attributes."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

# Those who hang hooks of their own onto parameters, and take care of them when a parameter is replaced.
ENGINES = ("torch", "deepspeed", "hpc_oialr")
_OF_TORCH = ("_ddp", "_mp_", "_fp_", "_fsdp", "_acc_grad", "_in_backward_optimizers")
_OF_DEEPSPEED = ("ds_id", "_hp_mapping")


def gradient_hooks(parameter: Tensor) -> list[Any]:
    """Hooks that a user has given to :meth:`torch.Tensor.register_hook` of a parameter."""
    return _of_users(parameter._backward_hooks)


def accumulation_hooks(parameter: Tensor) -> list[Any]:
    """Hooks that a user has given to ``register_post_accumulate_grad_hook`` of a parameter."""
    return _of_users(getattr(parameter, "_post_accumulate_grad_hooks", None))


def _of_users(hooks: dict[int, Any] | None) -> list[Any]:
    return [hook for hook in (hooks or {}).values() if _origin(hook).split(".")[0] not in ENGINES]


def _origin(hook: Any) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", None) or "")


def pass_on_attributes(old: Tensor, new: Tensor) -> None:
    """Give ``new`` what users have set on ``old``, such as ``p.no_weight_decay = True``.

    Tensors are left out: they are of the old shape.
    """
    for name, value in own_attributes(old).items():
        if not isinstance(value, Tensor):
            setattr(new, name, value)


def own_attributes(parameter: Tensor) -> dict[str, Any]:
    """What users have set on a parameter."""
    if type(parameter) is not nn.Parameter or any(hasattr(parameter, name) for name in _OF_DEEPSPEED):
        return {}
    return {name: value for name, value in vars(parameter).items() if not name.startswith(_OF_TORCH)}


def pass_on_hooks(old: Tensor, new: Tensor) -> None:
    """Give ``new`` the users' hooks of ``old``; handles that users hold go on removing them."""
    if gradient_hooks(old):
        new._backward_hooks = old._backward_hooks
    if accumulation_hooks(old):
        new._post_accumulate_grad_hooks = old._post_accumulate_grad_hooks
