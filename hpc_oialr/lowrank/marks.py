"""What users attach to a parameter: gradient hooks and attributes."""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

# Packages that register hooks on parameters and restore them themselves when a parameter is replaced.
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
    found = []
    for hook in (hooks or {}).values():
        plain = hook
        while isinstance(plain, functools.partial):
            plain = plain.func
        if str(getattr(plain, "__module__", None)).split(".")[0] not in ENGINES:
            found.append(hook)
    return found


def optimizer_in_hooks(parameter: Tensor, without: Sequence[Any] = ()) -> Any:
    """An optimizer of ``parameter`` that one of its hooks can reach; or None.

    Searched: what a hook is bound to, its closure, arguments and the globals it names, lists and dictionaries there, and
    the attribute that ``torch.distributed.optim._apply_optimizer_in_backward`` sets.
    """
    places = [*getattr(parameter, "_in_backward_optimizers", [])]
    for hook in accumulation_hooks(parameter):
        places += _reach(hook)
    for value in _nested(places, depth=3):
        groups = getattr(value, "param_groups", None)
        if isinstance(groups, list) and callable(getattr(value, "step", None)):
            held = any(p is parameter for group in groups for p in group["params"])
            if held and not any(value is other for other in without):
                return value
    return None


def _reach(hook: Any) -> list[Any]:
    """What a hook can use."""
    if isinstance(hook, functools.partial):
        return [*hook.args, *hook.keywords.values(), *_reach(hook.func)]
    if inspect.ismethod(hook):
        return [hook.__self__, *vars(hook.__self__).values(), *_reach(hook.__func__)]
    if not inspect.isfunction(hook):
        return list(vars(hook).values()) if hasattr(hook, "__dict__") else []
    used = inspect.getclosurevars(hook)
    values = [*used.nonlocals.values(), *used.globals.values(), *(hook.__defaults__ or ())]
    owners = [value for value in used.nonlocals.values() if type(value).__module__ != "builtins"]
    return values + [item for owner in owners if hasattr(owner, "__dict__") for item in vars(owner).values()]


def _nested(values: Iterable[Any], depth: int) -> Iterator[Any]:
    for value in values:
        yield value
        if depth and isinstance(value, (list, tuple, set, dict)):
            yield from _nested(value.values() if isinstance(value, dict) else value, depth - 1)


def is_in_optimizer(parameter: Tensor) -> bool:
    """Whether a group of any optimizer of the program holds it."""
    lists = (each for each in gc.get_referrers(parameter) if type(each) is list)
    groups = (group for each in lists for group in gc.get_referrers(each) if type(group) is dict)
    return any(any(p is parameter for p in group.get("params", ())) for group in groups)


def own_attributes(parameter: Tensor) -> dict[str, Any]:
    """What users have set on a parameter."""
    if type(parameter) is not nn.Parameter or any(hasattr(parameter, name) for name in _OF_DEEPSPEED):
        return {}
    return {name: value for name, value in vars(parameter).items() if not name.startswith(_OF_TORCH)}


def pass_on_attributes(old: Tensor, new: Tensor) -> None:
    """Copy what users have set on ``old``, such as ``p.no_weight_decay = True``; not tensors, which have its shape."""
    for name, value in own_attributes(old).items():
        if not isinstance(value, Tensor):
            setattr(new, name, value)


def pass_on_hooks(old: Tensor, new: Tensor) -> None:
    """Share the users' hooks of ``old`` with ``new``, so that handles they hold still remove them."""
    if gradient_hooks(old):
        new._backward_hooks = old._backward_hooks
    if accumulation_hooks(old):
        new._post_accumulate_grad_hooks = old._post_accumulate_grad_hooks
