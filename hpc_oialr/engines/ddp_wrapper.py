"""One ``DistributedDataParallel`` object for the whole run, though its module's parameters are replaced.

Accelerate, Lightning and Trainer call the wrapper they made; next to a new one theirs would average nothing. So torch's
constructor runs again on the existing object. All private names of torch's DDP are in this file.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed import BuiltinCommHookType  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from hpc_oialr.errors import ModelError

MIB = 1024**2

# Arguments for the start only, or that are refused; all others are read from the wrapper's attributes.
_NOT_KEPT = {
    "self",
    "module",
    "init_sync",
    "check_reduction",
    "broadcast_buffers",
    "device_mesh",
    "delay_all_reduce_named_params",
    "param_to_hook_all_reduce",
}
# Attributes that a user or a loop sets on the object.
_OWN_STATE = ("require_backward_grad_sync", "broadcast_bucket_size", "_ddp_sink_clone")
# Torch's modules with hooks that step the optimizer for one bucket.
_STEPPING_HOOKS = ("optimizer_overlap_hooks", "ddp_zero_hook")


def options_of(wrapper: DistributedDataParallel) -> dict[str, Any]:
    """The constructor's arguments to make such a wrapper again, in any version of torch."""
    known = [name for name in inspect.signature(DistributedDataParallel).parameters if name not in _NOT_KEPT]
    options = {name: getattr(wrapper, name) for name in known if hasattr(wrapper, name)}
    options["bucket_cap_mb"] = None if wrapper.bucket_bytes_cap_default else wrapper.bucket_bytes_cap / MIB
    if "bucket_cap_mb_list" in known:
        options["bucket_cap_mb_list"] = [size / MIB for size in wrapper.bucket_bytes_cap_list] or None
    if "forward_sync_buffers" not in known:
        options["broadcast_buffers"] = wrapper.broadcast_buffers
    return options


def require_renewable(wrapper: DistributedDataParallel) -> None:
    """Raise :class:`ModelError`, naming the option, if :func:`renew` cannot restore this wrapper."""
    if wrapper._delay_all_reduce_params:
        _refuse("delay_all_reduce_named_params", "hooks that single parameter, which may be replaced")
    mesh = getattr(wrapper, "device_mesh", None)
    if mesh is not None and mesh._get_root_mesh() != mesh:
        _refuse("device_mesh", "is one axis of a larger mesh: its parameters are parts of matrices")
    for hook, _ in wrapper._comm_hooks:
        if hook.__module__.endswith(_STEPPING_HOOKS):
            _refuse(f"communication hook {hook.__qualname__}", "steps the optimizer in the backward pass")


def _refuse(option: str, reason: str) -> None:
    raise ModelError(
        f"DistributedDataParallel's {option} {reason}; OIALR replaces parameters. Wrap the model without it."
    )


def joining(wrapper: DistributedDataParallel) -> bool:
    """Whether the loop is inside ``with wrapper.join()``."""
    return bool(wrapper._join_config.enable)


def ignored_parameters(wrapper: DistributedDataParallel) -> list[nn.Parameter]:
    """Parameters named in ``_ddp_params_and_buffers_to_ignore``."""
    names = wrapper.parameters_to_ignore
    return [p for name, p in wrapper.module.named_parameters(remove_duplicate=False) if name in names]


def keep_ignored(wrapper: DistributedDataParallel, parameters: Iterable[nn.Parameter]) -> None:
    """Ignore these under their present names, which change when an attention is unpacked."""
    ids = {id(p) for p in parameters}
    if ids:
        module = wrapper.module
        here = {name for name, p in module.named_parameters(remove_duplicate=False) if id(p) in ids}
        module._ddp_params_and_buffers_to_ignore = here | wrapper.parameters_to_ignore


def release(wrapper: DistributedDataParallel) -> None:
    """Remove the wrapper's hooks from its module and parameters."""
    # Autograd nodes of parameters that stay would still call the old reducer.
    wrapper.reducer._remove_autograd_hooks()
    for handle in getattr(wrapper, "_accum_grad_hooks", ()):
        handle.remove()
    if wrapper.mixed_precision is None:
        return
    for module in wrapper.module.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if getattr(hook, "__self__", None) is wrapper:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    restore_values(wrapper.module.parameters())


def restore_values(parameters: Iterable[nn.Parameter]) -> None:
    """Restore the values that ``mixed_precision`` has replaced, as after a forward pass without a backward."""
    for p in parameters:
        kept: Tensor | None = getattr(p, "_fp_param", None)
        if kept is not None and p.dtype != kept.dtype:
            p.data = kept


def renew(wrapper: DistributedDataParallel, *, bucket_cap_mb: float) -> None:
    """Rebuild the wrapper's buckets and hooks for its module's present parameters; nothing is sent.

    The object keeps its options, everything the user has set or registered on it, and ``no_sync``. Communication hooks
    lose state by bucket, see :func:`forget_buckets`. ``bucket_cap_mb`` applies if the wrapper has no list of sizes.
    """
    options = options_of(wrapper) | {"bucket_cap_mb": bucket_cap_mb}
    # With mixed_precision torch registers its own hook, and there can be one only.
    hooks = [] if wrapper.mixed_precision is not None else list(wrapper._comm_hooks)
    # A builtin hook is recorded in torch's log only.
    logged = str(wrapper._get_ddp_logging_data().get("comm_hook", ""))
    builtin = BuiltinCommHookType.__members__.get(logged.removeprefix("BuiltinCommHookType."))
    for hook, state in hooks:
        forget_buckets(hook, state)
    release(wrapper)
    kept = {name: vars(wrapper)[name] for name in (*vars(nn.Module()), *_OWN_STATE) if name in vars(wrapper)}
    with warnings.catch_warnings():
        # Said once, when the user made it.
        warnings.filterwarnings("ignore", message="You passed find_unused_parameters=true")
        DistributedDataParallel.__init__(wrapper, wrapper.module, init_sync=False, **options)
    vars(wrapper).update(kept)
    for hook, state in hooks:
        wrapper.register_comm_hook(state, hook)
    if builtin is not None:
        wrapper._register_builtin_comm_hook(builtin)


def forget_buckets(hook: Callable[..., Any], state: object) -> None:
    """Drop a communication hook's state of old buckets.

    PowerSGD loses its last error feedback and its warm start, and sends one step uncompressed, as in its second step,
    after which buckets are reordered. Any other state with tensors must have a method ``forget_buckets()``.
    """
    if callable(forget := getattr(state, "forget_buckets", None)):
        forget()
    elif hasattr(state, "start_powerSGD_iter"):
        for memory in (state.error_dict, state.p_memory_dict, state.q_memory_dict):  # type: ignore[attr-defined]
            memory.clear()
        state.iter = min(state.iter, state.start_powerSGD_iter - 1)  # type: ignore[attr-defined]
    elif _holds_tensors(state):
        raise ModelError(
            f"the communication hook {hook.__qualname__} keeps tensors in its {type(state).__name__}, perhaps by "
            "bucket, and buckets have changed with r. Give the state a method forget_buckets() that empties them, or "
            "does nothing if they are not by bucket."
        )


def _holds_tensors(state: object, depth: int = 3) -> bool:
    if isinstance(state, Tensor):
        return state.numel() > 1
    if depth == 0 or state is None:
        return False
    values: Iterable[object] = ()
    if isinstance(state, Mapping):
        values = state.values()
    elif isinstance(state, (list, tuple, set)):
        values = state
    elif hasattr(state, "__dict__") and not isinstance(state, (nn.Module, type)) and not callable(state):
        values = vars(state).values()
    return any(_holds_tensors(value, depth - 1) for value in values)
