"""Sums that hooks on layers gather in the last steps before a change, each rank from its own samples.

Hooks exist in these steps only, in which the model's compiled code is set aside, since it would not run them; the change
begins with one all-reduce a layer.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hpc_oialr.lowrank import TargetWeight
from hpc_oialr.lowrank.attachment import LayerHook
from hpc_oialr.method.config import OIALRConfig
from hpc_oialr.method.engine import Engine
from hpc_oialr.torch_compat import PausedCode, is_transformed

log = logging.getLogger(__name__)


class LayerSums:
    """The sums of one layer on this rank, all in one buffer, and the hooks that add to them."""

    def __init__(
        self, target: TargetWeight, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        # DeepSpeed would gather a parameter that a hook only asks for its device.
        self.target, self._is_cuda = target, target.trained.is_cuda
        self._shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        numbers = sum(shape.numel() for shape in self._shapes.values())
        # Forward passes add to it, which a tensor of the caller's inference mode does not allow.
        with torch.inference_mode(False):
            self.flat = torch.zeros(numbers, dtype=dtype, device=device)

    def totals(self) -> dict[str, Tensor]:
        """The sums by name, views of ``flat``."""
        parts = self.flat.split([shape.numel() for shape in self._shapes.values()])
        return {name: part.view(self._shapes[name]) for name, part in zip(self._shapes, parts, strict=True)}

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the layer's forward pass."""

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Hook after the forward pass: another output, or None."""

    def _counts(self, module: nn.Module) -> bool:
        """Whether this is a training pass in eager mode."""
        captured = self._is_cuda and torch.cuda.is_current_stream_capturing()
        return module.training and torch.is_grad_enabled() and not captured and not is_transformed()


S = TypeVar("S", bound=LayerSums)


class Gatherer(Generic[S]):
    """Gathers one kind of sums of the layers that change next."""

    kind: ClassVar[str]  # in the names of a checkpoint's tensors
    without: ClassVar[str]  # what becomes of a layer whose passes no hook sees

    def __init__(self, config: OIALRConfig, engine: Engine) -> None:
        self._config, self._engine = config, engine
        self._sums: dict[str, S] = {}
        self._handles: list[RemovableHandle] = []
        self._told = False  # whether the log says that a layer changes without them
        self._late = False  # the last window had begun before it was opened here

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handles": []}

    def near(self, t: int) -> bool:
        """Whether the step after ``t`` is among the last ones before a change."""
        raise NotImplementedError

    def acts(self, t: int) -> bool:
        """Whether :meth:`watch` has something to do after step ``t``."""
        return bool(self._sums or self._handles) or self.near(t)

    def watch(self, t: int, update: int, targets: Sequence[TargetWeight], streaks: Mapping[str, int]) -> None:
        """After step ``t``: gather in the next step for those layers that change in a few steps.

        ``targets`` are the dense ones, with their ``streaks`` of stability, and those that the next ``update`` reaches.
        """
        raise NotImplementedError

    def _open(self, found: Sequence[TargetWeight], make: Callable[[TargetWeight], S]) -> None:
        """Gather for these layers, if hooks see them, and no others in the next step."""
        self._late &= bool(found)
        self._untie()
        self._sums = {each.name: self._sums.get(each.name) or make(each) for each in found}

    def forget(self) -> None:
        """Free all sums and remove the hooks."""
        self._untie()
        self._sums.clear()
        self._late = False

    def _untie(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def tie(self) -> None:
        """Register the hooks, at the first forward pass of a step: after those by which an engine gathers factors."""
        if self._handles or not self._sums:
            return
        for sums in self._sums.values():
            before, after = LayerHook(sums.before), LayerHook(sums.after)
            self._handles += [
                sums.target.holder.register_forward_pre_hook(before, with_kwargs=True),
                sums.target.holder.register_forward_hook(after, with_kwargs=True),
            ]

    @property
    def sums(self) -> dict[str, Tensor]:
        """What hooks add to in the next step, by layer."""
        return {name: sums.flat for name, sums in self._sums.items()}

    def watches(self, target: TargetWeight) -> bool:
        """Whether a layer's sums are gathered; the same on every rank."""
        return target.name in self._sums

    def _reduced(self, target: TargetWeight) -> S:
        """The sums of a watched layer over all ranks, here no longer; a collective call."""
        sums = self._sums.pop(target.name)
        sums.flat = sums.flat.to(target.trained.device)
        self._engine.data_parallel.all_reduce(sums.flat)
        return sums

    def _tell(self, target: TargetWeight, why: str) -> None:
        """Log once that a change of r does without sums."""
        if not self._told:
            log.info("%s %s, maybe others too: %s", target.name, self.without, why)
        self._told = True

    # -- checkpoints -----------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """A copy of this rank's sums, ``NAME.KIND.RANK``."""
        rank = self._engine.world.rank
        return {f"{name}.{self.kind}.{rank}": sums.flat.clone() for name, sums in self._sums.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take this rank's sums of :meth:`state`; of another number of ranks, those of every so many-th."""
        world = self._engine.world
        if self._late and not any(f".{self.kind}." in key for key in tensors):
            log.warning(
                "resumed without the %s that the steps before had gathered for the next change of r: it sees later steps "
                "only. For a run of the same bits store oialr.tensor_state() beside oialr.state_dict(), and load both.",
                self.kind,
            )
        for name, sums in self._sums.items():
            start = f"{name}.{self.kind}."
            ranks = sorted(int(key.removeprefix(start)) for key in tensors if key.startswith(start))
            for rank in ranks:
                if rank % world.size == world.rank:
                    sums.flat += tensors[f"{start}{rank}"].to(sums.flat)


class Window:
    """All that is gathered for the next change of a controller's layers, while the model's compiled code is set aside."""

    def __init__(self, engine: Engine, *gatherers: Gatherer[Any]) -> None:
        self._engine, self._gatherers, self._code = engine, gatherers, PausedCode()

    @property
    def sums(self) -> list[Tensor]:
        """What hooks add to in the next step."""
        return [sums for each in self._gatherers for sums in each.sums.values()]

    def acts(self, t: int) -> bool:
        """Whether :meth:`watch` has something to do after step ``t``."""
        return any(each.acts(t) for each in self._gatherers)

    def watch(self, t: int, update: int, targets: Sequence[TargetWeight], streaks: Mapping[str, int]) -> None:
        """See :meth:`Gatherer.watch`."""
        for each in self._gatherers:
            each.watch(t, update, targets, streaks)
        self._let_hooks_run()

    def tie(self) -> None:
        """See :meth:`Gatherer.tie`."""
        for each in self._gatherers:
            each.tie()
        self._let_hooks_run()  # code that was compiled since the last step

    def forget(self) -> None:
        """Free all sums, remove the hooks, put compiled code back."""
        for each in self._gatherers:
            each.forget()
        self._let_hooks_run()

    def state(self) -> dict[str, Tensor]:
        """A copy of this rank's sums, see :meth:`Gatherer.state`."""
        return {name: tensor for each in self._gatherers for name, tensor in each.state().items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take this rank's sums of :meth:`state`."""
        for each in self._gatherers:
            each.restore(tensors)

    def restore_code_with(self, controller: object) -> None:
        """Put compiled code back also when the controller is dropped."""
        weakref.finalize(controller, self._code.resume)

    def _let_hooks_run(self) -> None:
        """Set compiled code aside for the next step if its hooks must run, else put it back."""
        if any(each.sums for each in self._gatherers):
            self._code.pause(self._engine.model)
        else:
            self._code.resume()
