"""DistributedDataParallel around a module whose parameters are replaced now and then."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hpc_oialr.distributed import World
from hpc_oialr.engines.base import GroupEngine
from hpc_oialr.engines.ddp_wrapper import (
    MIB,
    full_precision,
    ignored_parameters,
    joining,
    keep_ignored,
    options_of,
    release,
    renew,
    require_renewable,
)
from hpc_oialr.errors import ModelError
from hpc_oialr.lowrank import TargetWeight
from hpc_oialr.streams import without_lines

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
    return min(_BUCKET_MB, max(_FIRST_BUCKET_MB, trained_bytes / _BUCKETS / MIB))


class DDPEngine(GroupEngine):
    """Averages the gradients of what is trained, and of nothing else, while they are computed.

    Parameters
    ----------
    world
        All ranks.
    find_unused_parameters, gradient_as_bucket_view
        As in ``DistributedDataParallel``. Bucket views save one copy of the gradients.
    bucket_cap_mb
        As in ``DistributedDataParallel``; None: :func:`bucket_mb` of what is trained whenever the wrapper is made.

    Notes
    -----
    Each step sends every trained parameter's gradient once; a rebuild sends nothing. A module without
    any trained parameter is not wrapped. There is one wrapper for the whole run, which is rebuilt inside when shapes
    change, so that references to it stay valid.

    The sum over three CPU ranks or more depends on where in its bucket a gradient lies, and a wrapper
    reorders its buckets after its first step, unless it looks for unused parameters. There it always
    does, so that a run that was stopped at any step and resumed has the bits of an uninterrupted one. This
    takes 1 to 2 ms a step for 150 parameters.
    """

    whole_factors = True
    wrapper: DistributedDataParallel | None = None

    def __init__(
        self,
        world: World,
        *,
        find_unused_parameters: bool = False,
        gradient_as_bucket_view: bool = True,
        bucket_cap_mb: float | None = None,
    ) -> None:
        self.world = world
        # Whether buckets must stay as they are for the sake of equal bits.
        self._keeps_order = world.size > 2 and world.device.type == "cpu"
        self._options: dict[str, Any] = {
            "process_group": world.group,
            "find_unused_parameters": find_unused_parameters or self._keeps_order,
            "gradient_as_bucket_view": gradient_as_bucket_view,
        }
        self._bucket_cap_mb = bucket_cap_mb
        self._outer: nn.Module | None = None
        self._ignored: list[nn.Parameter] = []

    @classmethod
    def adopting(cls, model: DistributedDataParallel, outer: nn.Module | None = None) -> DDPEngine:
        """An engine that uses a wrapper its user made: the object, its group, devices, options and hooks.

        ``outer`` is what the user calls, if something is around the wrapper: ``torch.compile``'s module. Raises
        :class:`ModelError` if an option of the wrapper does not allow that parameters are replaced.
        """
        require_renewable(model)
        engine = cls(World.current(model.process_group))
        engine._ignored = ignored_parameters(model)
        engine._bucket_cap_mb = options_of(model)["bucket_cap_mb"]
        engine.wrapper, engine._outer = model, model if outer is None else outer
        return engine

    def wrap(self, module: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
        """The module in a wrapper; if it was adopted in one, that wrapper."""
        if self._outer is not None:
            return self._outer
        if not _trained(module):
            self.send_initial(module)
            return module
        if self._keeps_order:
            # Torch says once that no parameter is unused, which is known; it may, with stderr filtered.
            with without_lines([b"find_unused_parameters=True was specified"]):
                DistributedDataParallel(nn.Linear(1, 1), **self._options)(torch.zeros(1, 1))
        return self._make(module, init_sync=True)

    def rewrap(self, module: nn.Module) -> nn.Module:
        """The same wrapper object, rebuilt inside."""
        wrapper = self.wrapper
        if wrapper is None:
            return self._make(module, init_sync=False) if _trained(module) else module
        if _trained(module):
            keep_ignored(wrapper, self._ignored)
            renew(wrapper, bucket_cap_mb=self._bucket_mb(module))
        elif self._outer is None:
            release(wrapper)
            self.wrapper = None
            return module
        # Hooks of an adopted wrapper that has nothing to average do no harm.
        return wrapper if self._outer is None else self._outer

    def _make(self, module: nn.Module, *, init_sync: bool) -> nn.Module:
        self.wrapper = DistributedDataParallel(
            module, init_sync=init_sync, bucket_cap_mb=self._bucket_mb(module), **self._options
        )
        return self.wrapper

    def _bucket_mb(self, module: nn.Module) -> float:
        return self._bucket_cap_mb or bucket_mb(sum(p.nbytes for p in module.parameters() if p.requires_grad))

    def gather(self, target: TargetWeight) -> None:
        """See that the values are those that are trained, not ``mixed_precision``'s copies."""
        full_precision(target.holder.parameters())

    @property
    def ignored(self) -> Collection[int]:
        """Those that the wrapper leaves out."""
        return {id(p) for p in self._ignored}

    def check_step(self) -> None:
        """Refuse ``join()``: a rank that has run out of samples takes no part in updates."""
        if self.wrapper is not None and joining(self.wrapper):
            raise ModelError(
                "oialr.step() inside DistributedDataParallel.join(): a process that has run out of samples takes no more "
                "steps, and updates are made by all together. Give all processes equally many batches."
            )

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """``DistributedDataParallel.no_sync``."""
        return nullcontext() if self.wrapper is None else self.wrapper.no_sync()


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
