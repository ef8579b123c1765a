"""Every private name of torch that the package uses, each looked up when it is first needed.

Private names move between versions. ``import hpc_oialr`` and training on one process or under
``DistributedDataParallel`` need none of those imported under ``TYPE_CHECKING``: without one of them only the engine or
command built on it fails, before any work is done. Attributes of torch's own objects are read in
``engines/ddp_wrapper.py`` and ``engines/fsdp.py``.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributions import Distribution
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import register_flop_formula

from hpc_oialr.errors import TorchVersionError
from hpc_oialr.lazy import imports_for_types

# DefaultStager.stage of torch 2.11 closes the stager, whose next copy then fails; that of 2.13 does not.
STAGERS_SERVE_ONCE = Version(torch.__version__) < Version("2.13")

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo
    from torch.distributed.tensor._redistribute import _gen_transform_infos, clear_redistribute_planner_cache
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

__all__ = [
    "CollectiveOp", "FSDPParam", "FakeStore", "FakeTensorMode", "ParamModuleInfo", "TorchDispatchMode",
    "_clear_sharding_prop_cache", "_gen_transform_infos", "clear_redistribute_planner_cache", "collective_ops",
    "sync_ops", "tree_leaves",
]  # fmt: skip

# Oldest and newest torch that the tests have run with.
TESTED = "2.11 to 2.14"

_HOMES = imports_for_types(__file__)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = _find(name)
    return value


def _find(name: str, purpose: str = "this") -> Any:
    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
    except (ImportError, AttributeError) as error:
        raise TorchVersionError(
            f"{purpose} needs {_HOMES[name]}.{name}, which torch {torch.__version__} does not have. "
            f"Install torch {TESTED}."
        ) from error


def require_dtensors(purpose: str, *also: str) -> None:
    """Raise TorchVersionError, with the name, if torch lacks one that :func:`forget_shapes` uses, or one of ``also``."""
    caches = ("FakeTensorMode", "_clear_sharding_prop_cache", "_gen_transform_infos")
    for name in (*caches, "clear_redistribute_planner_cache", *also):
        _find(name, purpose)


def forget_shapes() -> None:
    """Clear torch's unbounded caches of how operations on DTensors split their results (as of torch 2.13).

    They gain a hundred objects a layer at each change of r that are never used again; refilling takes milliseconds.
    """
    forget_groups()
    _find("clear_redistribute_planner_cache")()
    _find("_gen_transform_infos").cache_clear()
    _find("FakeTensorMode").cache_clear()


def forget_groups() -> None:
    """Clear the cache that refers to process groups, and would keep them alive."""
    _find("_clear_sharding_prop_cache")()


def fsdp_param_groups(module: nn.Module) -> list[Any]:
    """FSDP2's parameter groups of a module after ``fully_shard``: one at most before torch 2.13."""
    state = module._get_fsdp_state()  # type: ignore[operator]
    several = getattr(state, "_fsdp_param_groups", None)
    if several is not None:
        return list(several)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def has_final_buckets(wrapper: DistributedDataParallel) -> bool:
    """Whether buckets lie in the order of the backward pass, as they do from the second step on."""
    return bool(wrapper._has_rebuilt_buckets)


def onednn_enabled() -> bool:
    """Whether oneDNN is available, enabled, and has its linear product."""
    return (
        torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def register_onednn_flops() -> None:
    """Tell ``torch.utils.flop_counter`` how many operations :func:`onednn_linear` takes."""

    def flops(x: tuple[int, ...], weight: tuple[int, ...], *_: Any, **__: Any) -> int:
        return 2 * math.prod(x) * weight[0]

    if torch.backends.mkldnn.is_available():
        register_flop_formula(torch.ops.mkldnn._linear_pointwise)(flops)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` of two matrices on the CPU, without a graph."""
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


def is_transformed() -> bool:
    """Whether a compiler, tracer, ``torch.func`` or forward-mode AD is active; True if torch cannot tell any more.

    Kernels that only reverse-mode autograd knows must not be called then.
    """
    # First, since torch.compile cannot look behind the others.
    if torch.compiler.is_compiling():
        return True
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return True
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return getattr(forward_ad, "_current_level", 0) >= 0 or active is None or active()


_paused: WeakSet[nn.Module] = WeakSet()


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called; also while :class:`PausedCode` has set its code aside."""
    return module._compiled_call_impl is not None or module in _paused


class PausedCode:
    """Code of ``torch.compile`` in a model that is set aside, so that its modules run eagerly, with their hooks.

    ``torch.compiler.set_stance`` would change all models of the process.
    """

    def __init__(self) -> None:
        self._code: dict[nn.Module, Callable[..., Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_code": {}}  # modules leave their compiled code behind when they are copied

    def pause(self, model: nn.Module) -> None:
        """Let all of the model run eagerly, also what has been compiled since the last call."""
        for module in model.modules():
            if is_wrapper(module):
                eager = cast(nn.Module, module._orig_mod).__call__
                if vars(module)["forward"] != eager:
                    self._code[module], module.forward = vars(module)["forward"], eager
            elif (code := module._compiled_call_impl) is not None:
                self._code[module], module._compiled_call_impl = code, None
                _paused.add(module)

    def resume(self) -> None:
        """Put the code back, but where a module was compiled anew meanwhile."""
        for module, code in self._code.items():
            _paused.discard(module)
            if is_wrapper(module):
                module.forward = code
            elif module._compiled_call_impl is None:
                module._compiled_call_impl = code
        self._code.clear()


def is_wrapper(module: nn.Module) -> bool:
    """Whether it is what ``torch.compile(model)`` returns."""
    return type(module).__name__ == "OptimizedModule"


def is_watched() -> bool:
    """Whether a ``TorchDispatchMode`` sees every operation of torch, e.g. to count them; False if torch cannot tell."""
    depth = getattr(torch._C, "_len_torch_dispatch_stack", None)
    return depth is not None and depth() > 0


def active_ddp_module() -> DistributedDataParallel | None:
    """The ``DistributedDataParallel`` whose forward pass is running."""
    active: DistributedDataParallel | None = DistributedDataParallel._get_active_ddp_module()
    return active


def is_allocation(kind: object) -> bool:
    """Whether an event of the profiler's tree is one of the allocator."""
    return bool(kind == torch._C._profiler._EventType.Allocation)


def graphs_compiled() -> int:
    """Graphs that torch.compile has captured in this process so far; 0 if it was never used."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo is not None else 0


def recompile_limit(times: int) -> AbstractContextManager[None]:
    """While active, let torch.compile make so many graphs of one function; its own limit is 8."""
    config: Any = torch._dynamo.config
    return cast(AbstractContextManager[None], config.patch(recompile_limit=times))


def allow_recompiles(times: int) -> None:
    """As :func:`recompile_limit`, to the end of the process; a higher limit stays."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(times, config.recompile_limit)


def free_pool(pool: Any, device: torch.device) -> None:
    """End the use of a pool of memory by a capture that failed, as ``torch.cuda.use_mem_pool`` ends its own.

    Until then the allocator takes the capture for running, and gives back no cached memory of any pool.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with suppress(RuntimeError):  # where a newer torch has done so
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)


@contextmanager
def unchecked_distributions() -> Iterator[None]:
    """While active, distributions do not look for impossible values, which would wait for a GPU."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)
