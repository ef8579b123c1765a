"""What the method asks of whatever holds the model: one process by itself, or an engine of many.

The method knows this interface only. Engines of several processes (:mod:`hpc_oialr.engines`) are imported when a model is
wrapped or a process group exists, see :func:`adopt`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from hpc_oialr.errors import ModelError
from hpc_oialr.lowrank import TargetWeight, untied_state
from hpc_oialr.lowrank.base import LowRankWeight
from hpc_oialr.lowrank.layout import REPLICATED, Replicated
from hpc_oialr.torch_compat import active_ddp_module

T = TypeVar("T")

# Has ``engine_of(model)`` for these wrappers and for several processes; imported when there is one or the other.
_ENGINES = "hpc_oialr.engines.factory"
_WRAPPERS = {"DistributedDataParallel", "FSDPModule", "OptimizedModule"}
_REFUSED_WRAPPERS = {
    "DataParallel": "use DistributedDataParallel, which copies nothing in each step",
    "FullyShardedDataParallel": "shard it by torch.distributed.fsdp.fully_shard (FSDP2) instead",
    "DeepSpeedEngine": "let oialr make the engine: --engine DeepSpeed",
    "AveragedModel": "pass the model that is trained, and this one as averages=[...]",
}


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> None:
        """Wait for it; what it fills must not be used before."""


class Peers(Protocol):
    """The processes that hold the model, as the method sees them; :class:`hpc_oialr.distributed.World` is one."""

    @property
    def rank(self) -> int:
        """This process."""

    @property
    def size(self) -> int:
        """How many there are."""

    @property
    def device(self) -> torch.device:
        """Where this process computes."""

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Their process group; None stands for one process."""

    def broadcast(self, tensor: Tensor, src: int) -> Pending | None:
        """Send ``tensor`` from process ``src`` into every other's; None if nothing is to be waited for."""

    def share(self, tensors: Iterable[Tensor], src: int = 0) -> None:
        """Send process ``src``'s values into every process's tensors."""

    def all_reduce(self, tensor: Tensor, op: Any = "sum") -> Tensor:
        """Reduce ``tensor`` over all processes by "sum", "max" or "min", in place."""

    def all_gather_object(self, obj: T) -> list[T]:
        """Every process's object, in order of rank."""


class OneProcess:
    """:class:`Peers` of a process that is alone."""

    rank, size, group = 0, 1, None

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def broadcast(self, tensor: Tensor, src: int) -> None:
        """Nothing."""

    def share(self, tensors: Iterable[Tensor], src: int = 0) -> None:
        """Nothing."""

    def all_reduce(self, tensor: Tensor, op: Any = "sum") -> Tensor:
        """The tensor."""
        return tensor

    def all_gather_object(self, obj: T) -> list[T]:
        """The object."""
        return [obj]


class Engine(ABC):
    """How the processes of a run hold one model and share its gradients.

    The life of an engine: :meth:`place` a new module, make the optimizer, :meth:`wrap` both; then in
    every step the wrapped module's forward, :meth:`backward`, :meth:`update`; when the method changes
    layers, :meth:`gather` before, :meth:`on_replace` after each, :meth:`rewrap` at the end.

    Attributes
    ----------
    world
        All processes.
    layout
        How one matrix is stored.
    whole_factors
        Whether a process has all of ``U`` and ``Vh`` at all times, in ordinary tensors.
    steps_itself
        Whether the optimizer given to :meth:`wrap` never steps.
    pairs
        Layers of the model between which features may stay split; set before :meth:`place`.
    """

    world: Peers
    layout: Replicated
    whole_factors: bool = False
    pairs: Sequence[Any] = ()
    steps_itself: bool = False

    @property
    def data(self) -> Peers:
        """The processes over which a global batch is dealt; all, unless several work on the same samples."""
        return self.world

    @property
    def replicas(self) -> Peers:
        """The processes that must hold equal bits of what this one stores."""
        return self.world

    # -- the model's life ------------------------------------------------------------------------

    def expect(self, *, global_batch: int, accumulation: int, clip: float | None) -> None:
        """Compare settings of the engine's own with those of a step, if it has such; a ConfigError if they differ."""
        return

    def scale_steps(self, factors: Mapping[nn.Parameter, float]) -> None:
        """Multiply each core's step by its factor, where hooks on the optimizer given to :meth:`wrap` never run."""
        return

    def place(self, module: nn.Module) -> None:
        """Put the parameters of a new module where they will live, in place; before the optimizer is made."""
        return

    @abstractmethod
    def wrap(self, module: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
        """What to call in the loop; all processes begin with process 0's parameters and buffers."""

    @abstractmethod
    def rewrap(self, module: nn.Module) -> nn.Module:
        """The same after parameters were replaced or frozen; nothing is broadcast.

        Only DeepSpeed's engine gives another object than before.
        """

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The module inside what :meth:`wrap` returned; the same where there is no wrapper."""
        return model

    def end(self) -> None:
        """Let go of whatever would keep the process group alive; the module is not used after it."""
        return

    # -- a change of layers ----------------------------------------------------------------------

    def gather(self, target: TargetWeight) -> None:
        """Bring a layer's parameters to where ``layout`` says; a collective call before the method reads them.

        :meth:`release` or :meth:`on_replace` ends it.
        """
        return

    def gather_moments(self, parameter: nn.Parameter) -> None:
        """Bring a parameter's state to where ``optimizer.state`` shows it, as :meth:`gather` does; it is carried next."""
        return

    def local_shard(self, parameter: nn.Parameter) -> Tensor:
        """What this process stores of a parameter between steps."""
        return self.layout.local(parameter.detach())

    def basis_dtype(self, layer: LowRankWeight) -> torch.dtype:
        """In which dtype ``U`` and ``Vh`` are kept between steps, whatever :meth:`gather` shows them in."""
        return layer.U.dtype

    def any_rank(self, flags: Tensor) -> Tensor:
        """Findings about what is :meth:`local_shard`, above 0 where any process has made one; in place."""
        return self.layout.add(flags)

    def release(self, target: TargetWeight) -> None:
        """Let go of what :meth:`gather` brought, unchanged."""
        return

    def on_replace(self, layer: LowRankWeight) -> None:
        """The factors of ``layer`` are new, in value or as objects: let go of the old ones."""
        return

    def extra_tensors(self) -> Iterable[Tensor]:
        """Tensors that live between steps beside the module and its optimizer."""
        return ()

    # -- what a user's loop may do beside it -------------------------------------------------------

    @property
    def ignored(self) -> Collection[int]:
        """Ids of parameters that processes do not share, and which may therefore differ."""
        return ()

    def check_caller(self, module: nn.Module) -> None:
        """Raise :class:`ModelError` if ``module``, about to be called, is inside another DistributedDataParallel."""
        caller = active_ddp_module()
        if caller is not None and caller is not self.wrapper and any(m is module for m in caller.modules()):
            raise ModelError(
                "the model is called by another DistributedDataParallel than the one OIALR keeps up to date; its "
                "buckets would go stale when shapes change. Wrap the model first and give the wrapper to OIALR(...), or "
                "call oialr.model."
            )

    @property
    def wrapper(self) -> nn.Module | None:
        """The DistributedDataParallel that this engine keeps up to date, if there is one."""
        return None

    def check_step(self) -> None:
        """Raise :class:`ModelError` where an update could not be made together by all processes."""
        return

    def check_replicas(self, named: Mapping[str, Sequence[Tensor]]) -> None:
        """Raise :class:`ReplicaMismatchError` on every process unless all hold equal bits of these tensors, by name."""
        return

    # -- one step --------------------------------------------------------------------------------

    @abstractmethod
    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Context in which backward passes leave gradients local, to be summed by the next one outside."""

    def backward(self, loss: Tensor, scaler: torch.amp.GradScaler) -> None:
        """Gradients of the mean loss over all processes of ``data``."""
        scaler.scale(loss).backward()

    def update(
        self,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        parameters: Sequence[nn.Parameter],
        clip: float | None,
    ) -> None:
        """Clip the gradient of ``parameters`` to a 2-norm of ``clip``, step, and drop gradients."""
        if clip is not None:
            scaler.unscale_(optimizer)
            self.clip(parameters, clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    # -- checkpoints -----------------------------------------------------------------------------

    def model_tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """The state dict to be saved, or to be filled in place: whole tensors, or DTensors as they are split.

        A collective call; second names of tied weights are left out.
        """
        return untied_state(module)

    def gather_state(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Bring all state to where ``optimizer.state`` shows it, whole or as DTensors; a collective call."""
        return

    def scatter_state(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Take over what a checkpoint has put into the module and into ``optimizer.state``."""
        return

    def clip(self, parameters: Sequence[nn.Parameter], norm: float) -> None:
        """Scale gradients so that their joint 2-norm is at most ``norm``."""
        clip_grad_norm_(parameters, norm)


class SingleEngine(Engine):
    """One process: the module itself, without a process group."""

    layout = REPLICATED
    whole_factors = True

    def __init__(self, world: Peers | None = None) -> None:
        self.world = world or OneProcess()

    def wrap(self, module: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
        """The module."""
        return module

    def rewrap(self, module: nn.Module) -> nn.Module:
        """The module."""
        return module

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Nothing: gradients are local anyway."""
        return nullcontext()


def adopt(model: nn.Module) -> tuple[Engine, nn.Module]:
    """The engine that a user's model implies, and the module inside; a collective call where there are several processes.

    Raises
    ------
    ModelError
        If the model is wrapped in something whose parameters cannot be replaced.
    """
    kinds = [kind.__name__ for kind in type(model).__mro__]
    refused = next((kind for kind in kinds if kind in _REFUSED_WRAPPERS), None)
    if refused is not None:
        raise ModelError(
            f"the model is wrapped in {refused}; must be plain, in DistributedDataParallel or sharded by fully_shard: "
            f"{_REFUSED_WRAPPERS[refused]}."
        )
    if not _WRAPPERS.intersection(kinds) and not (dist.is_available() and dist.is_initialized()):
        return SingleEngine(), model
    found: tuple[Engine, nn.Module] = importlib.import_module(_ENGINES).engine_of(model)
    return found
