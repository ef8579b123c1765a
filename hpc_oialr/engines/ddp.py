"""DistributedDataParallel around a module whose parameters are replaced now and then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hpc_oialr.engines.base import Engine
from hpc_oialr.lowrank.layout import WHOLE
from hpc_oialr.processes import World
from hpc_oialr.quiet import without_lines

Hook = tuple[Callable[..., Any], object]

_MIB = 1024**2
# Torch's bucket where nothing is set, and its first one, which is small so that sending begins early.
_BUCKET_MB, _FIRST_BUCKET_MB = 25.0, 1.0
# All but the last bucket can travel beside the backward pass: with eight of them, 7/8 of the gradients.
_BUCKETS = 8


def bucket_mb(trained_bytes: float) -> float:
    """Size of a gradient bucket (MiB) where the user has set none: an eighth of what is trained, 1 to 25 MiB.

    Torch's 25 MiB are made for dense models. After the conversion a few percent of those gradients are left, which
    would fill one bucket and travel after the backward pass instead of beside it.

    Examples
    --------
    >>> bucket_mb(350e6), bucket_mb(16 * 2**20), bucket_mb(0)
    (25.0, 2.0, 1.0)
    """
    return min(_BUCKET_MB, max(_FIRST_BUCKET_MB, trained_bytes / _BUCKETS / _MIB))


class DDPEngine(Engine):
    """Averages the gradients of what is trained, and of nothing else, while they are computed.

    Parameters
    ----------
    world
        The processes.
    find_unused_parameters, gradient_as_bucket_view
        As in ``DistributedDataParallel``. Bucket views save one copy of the gradients.
    bucket_cap_mb
        As in ``DistributedDataParallel``; None: :func:`bucket_mb` of what is trained whenever the wrapper is made.

    Notes
    -----
    Each step sends every trained parameter's gradient once; a rebuild sends nothing. A module without
    any trained parameter is not wrapped.

    The sum over three CPU processes or more depends on where in its bucket a gradient lies, and a wrapper
    orders its buckets anew after its first step, unless it looks for unused parameters. There it always
    does, so that a run that was stopped at any step and resumed has the bits of the undisturbed one. This
    takes 1 to 2 ms a step for 150 parameters.
    """

    layout = WHOLE

    def __init__(
        self,
        world: World,
        *,
        find_unused_parameters: bool = False,
        gradient_as_bucket_view: bool = True,
        bucket_cap_mb: float | None = None,
    ) -> None:
        self.world = world
        self._options: dict[str, Any] = {
            "process_group": world.group,
            "find_unused_parameters": find_unused_parameters or _keeps_order(world),
            "gradient_as_bucket_view": gradient_as_bucket_view,
            "bucket_cap_mb": bucket_cap_mb,
        }
        self._hooks: list[Hook] = []
        self._broadcast_buffers = True
        self._wrapped: DistributedDataParallel | None = None

    @classmethod
    def adopting(cls, model: DistributedDataParallel) -> DDPEngine:
        """An engine that goes on with a wrapper its user made: same group, devices, options and hooks."""
        engine = cls(World.current(model.process_group))
        engine._options = _options_of(model)
        engine._hooks = list(model._comm_hooks)
        engine._broadcast_buffers = model.broadcast_buffers
        engine._wrapped = model
        return engine

    def wrap(self, module: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
        """The module in a wrapper; if it was adopted in one, that wrapper."""
        if self._wrapped is not None and self._wrapped.module is module:
            return self._wrapped
        if not _trained(module):
            self.send_initial(module)
        if _keeps_order(self.world):
            _spend_warning(self._options)
        return self._make(module, init_sync=True)

    def rewrap(self, module: nn.Module) -> nn.Module:
        """A new wrapper; the old one's hooks are taken off first, or gradients would be summed twice."""
        return self._make(module, init_sync=False)

    def _make(self, module: nn.Module, *, init_sync: bool) -> nn.Module:
        self._detach()
        if not _trained(module):
            return module
        options = dict(self._options)
        if options["bucket_cap_mb"] is None:
            options["bucket_cap_mb"] = bucket_mb(
                sum(p.nbytes for p in module.parameters() if p.requires_grad)
            )
        self._wrapped = DistributedDataParallel(module, init_sync=init_sync, **options)
        # Set afterwards: the argument's name differs between versions of torch.
        self._wrapped.broadcast_buffers = self._broadcast_buffers
        for hook, state in self._hooks:
            self._wrapped.register_comm_hook(state, hook)
        return self._wrapped

    def _detach(self) -> None:
        if self._wrapped is not None:
            # The autograd nodes of parameters that stay call an old reducer until it is taken off.
            self._wrapped.reducer._remove_autograd_hooks()
            self._wrapped = None

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The module inside."""
        return model.module if isinstance(model, DistributedDataParallel) else model

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """``DistributedDataParallel.no_sync``."""
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()


def _keeps_order(world: World) -> bool:
    """Whether buckets must stay as they are for the sake of equal bits."""
    return world.size > 2 and world.device.type == "cpu"


def _spend_warning(options: Mapping[str, Any]) -> None:
    """Let torch say once that no parameter is unused, which we know, where nobody hears it."""
    with without_lines([b"find_unused_parameters=True was specified"]):
        DistributedDataParallel(nn.Linear(1, 1), **options)(torch.zeros(1, 1))


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _options_of(model: DistributedDataParallel) -> dict[str, Any]:
    return {
        "process_group": model.process_group,
        "device_ids": model.device_ids,
        "output_device": model.output_device,
        "dim": model.dim,
        "find_unused_parameters": model.find_unused_parameters,
        "gradient_as_bucket_view": model.gradient_as_bucket_view,
        "static_graph": model.static_graph,
        "bucket_cap_mb": None if model.bucket_bytes_cap_default else model.bucket_bytes_cap / _MIB,
    }
