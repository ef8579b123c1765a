"""DistributedDataParallel around a module whose parameters are replaced during the run."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hpc_oialr.distributed import World
from hpc_oialr.engines import ddp_wrapper
from hpc_oialr.engines.base import GroupEngine
from hpc_oialr.errors import ModelError
from hpc_oialr.lowrank import TargetWeight
from hpc_oialr.streams import without_lines


def bucket_mb(trained_bytes: float) -> float:
    """Default size of a gradient bucket (MiB): an eighth of the trained parameters, 1 to 25 MiB.

    All buckets but the last overlap with the backward pass: of eight buckets 7/8 of the gradients. Torch's 25 MiB are
    for dense models; after the conversion the remaining gradients would fit one bucket, sent after the backward pass.

    Examples
    --------
    >>> bucket_mb(350e6), bucket_mb(16 * 2**20), bucket_mb(0)
    (25.0, 2.0, 1.0)
    """
    # Torch's default, and its first bucket, which is small so that sending begins early.
    return min(25.0, max(1.0, trained_bytes / 8 / 2**20))


class DDPEngine(GroupEngine):
    """Averages the gradients of trained parameters during the backward pass.

    ``world`` are all ranks; the options are those of :class:`~hpc_oialr.engines.settings.DDP`. One wrapper is used for
    the whole run and rebuilt inside when shapes change, so that references to it stay valid; a rebuild sends nothing.
    A module without trained parameters is not wrapped.

    Notes
    -----
    The sum over three or more CPU ranks depends on where in its bucket a gradient lies, and a wrapper reorders its
    buckets after its first step unless it looks for unused parameters. So on CPUs it always does, and a run resumed
    from any step has the bits of an uninterrupted one. This takes 1 to 2 ms a step for 150 parameters.
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
        # Whether buckets must keep their order, for equal bits.
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
        """An engine that uses the user's wrapper, with its group, devices, options and hooks.

        ``outer`` is what the user calls instead, e.g. ``torch.compile``'s module. Raises :class:`ModelError` if an
        option of the wrapper does not allow parameters to be replaced.
        """
        ddp_wrapper.require_renewable(model)
        engine = cls(World.current(model.process_group))
        engine._ignored = ddp_wrapper.ignored_parameters(model)
        engine._bucket_cap_mb = ddp_wrapper.options_of(model)["bucket_cap_mb"]
        engine.wrapper, engine._outer = model, model if outer is None else outer
        return engine

    def wrap(self, module: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
        """The module in a new wrapper, or the user's wrapper."""
        if self._outer is not None:
            return self._outer
        if not _trained(module):
            self.send_initial(module)
            return module
        if self._keeps_order:
            # Let torch print its one warning that no parameter is unused, with stderr filtered.
            with without_lines([b"find_unused_parameters=True was specified"]):
                DistributedDataParallel(nn.Linear(1, 1), **self._options)(torch.zeros(1, 1))
        return self._make(module, init_sync=True)

    def rewrap(self, module: nn.Module) -> nn.Module:
        """The same wrapper object, rebuilt inside."""
        wrapper = self.wrapper
        if wrapper is None:
            return self._make(module, init_sync=False) if _trained(module) else module
        if _trained(module):
            ddp_wrapper.keep_ignored(wrapper, self._ignored)
            ddp_wrapper.renew(wrapper, bucket_cap_mb=self._bucket_mb(module))
        elif self._outer is None:
            ddp_wrapper.release(wrapper)
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
        """Restore the trained values in place of ``mixed_precision``'s copies."""
        ddp_wrapper.restore_values(target.holder.parameters())

    @property
    def ignored(self) -> Collection[int]:
        """Parameters that the wrapper ignores."""
        return {id(p) for p in self._ignored}

    def check_step(self) -> None:
        """Refuse ``join()``: a rank without samples would miss the collective calls of an update."""
        if self.wrapper is not None and ddp_wrapper.joining(self.wrapper):
            raise ModelError(
                "oialr.step() inside DistributedDataParallel.join(): a rank that has run out of samples takes no more "
                "steps, and updates are made by all together. Give all ranks equally many batches."
            )

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """``DistributedDataParallel.no_sync``."""
        return nullcontext() if self.wrapper is None else self.wrapper.no_sync()


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
