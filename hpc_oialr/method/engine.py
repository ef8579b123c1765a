"""What the method needs of whatever holds the model: one process, or an engine of many ranks.

The method knows this interface only. Engines of several ranks (:mod:`hpc_oialr.engines`) are imported when a model is
wrapped or a process group exists, see :func:`adopt`.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

# Has ``engine_of(model)`` for these wrappers and for several ranks; imported when there is one or the other.
_ENGINES = "hpc_oialr.engines.settings"
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
    """The ranks that hold the model, as the method sees them; :class:`hpc_oialr.distributed.World` is one.

    The bodies below are those of a process that is alone, see :class:`OneProcess`.
    """

    @property
    def rank(self) -> int:
        """This process."""
        return 0

    @property
    def size(self) -> int:
        """How many there are."""
        return 1

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Their process group; None stands for one process."""
        return None

    def broadcast(self, tensor: Tensor, src: int) -> Pending | None:
        """Send ``tensor`` from rank ``src`` into every other's; None if there is nothing to wait for."""
        return None

    def share(self, tensors: Iterable[Tensor], src: int = 0) -> None:
        """Send rank ``src``'s values into every rank's tensors."""
        return

    def all_reduce(self, tensor: Tensor, op: Any = "sum") -> Tensor:
        """Reduce ``tensor`` over all ranks by "sum", "max" or "min", in place."""
        return tensor

    def all_gather_object(self, obj: T) -> list[T]:
        """Every rank's object, in order."""
        return [obj]


class OneProcess(Peers):
    """A process that is alone."""


class Engine:
    """How the ranks of a run hold one model and share its gradients; the defaults are those of one process.

    The life of an engine: :meth:`place` a new module, make the optimizer, :meth:`wrap` both; then in
    every step the wrapped module's forward, :meth:`backward`, :meth:`update`. When the method changes layers,
    everything happens inside :meth:`changing`: :meth:`gather` a layer before it is read, and put its new factors and
    moments in place inside :meth:`replacing`.

    Attributes
    ----------
    world
        All ranks.
    layout
        How one matrix is stored.
    whole_factors
        Whether a rank has all of ``U`` and ``Vh`` at all times, in ordinary tensors.
    steps_itself
        Whether the optimizer given to :meth:`wrap` never steps.
    pairs
        Layers of the model between which features may stay split; set before :meth:`place`.
    model
        What the method's user calls in the loop: the last result of :meth:`wrap` or :meth:`rewrap`.
    wrapper
        The ``DistributedDataParallel`` that this engine keeps up to date, if there is one.
    """

    world: Peers
    layout: Replicated = REPLICATED
    whole_factors: bool = False
    steps_itself: bool = False
    pairs: Sequence[Any] = ()
    model: nn.Module
    wrapper: nn.Module | None = None
    _reshaped: bool | None = None  # whether a parameter was replaced; None outside of changing()

    @property
    def data_parallel(self) -> Peers:
        """The ranks over which a global batch is split; all, unless several work on the same samples."""
        return self.world

    @property
    def replicas(self) -> Peers:
        """The ranks that must hold equal bits of what this one stores."""
        return self.world

    # -- the model's life ------------------------------------------------------------------------

    def expect(self, *, global_batch: int, accumulation: int, clip: float | None) -> None:
        """Raise :class:`ConfigError` if the engine has settings of its own for a step, and they differ."""

    def scale_steps(self, factors: Mapping[nn.Parameter, float]) -> None:
        """Multiply each core's step by its factor, where hooks on the optimizer given to :meth:`wrap` never run."""

    def place(self, module: nn.Module) -> None:
        """Put the parameters of a new module where they will live, in place; before the optimizer is made."""

    def wrap(self, module: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
        """What to call in the loop; all ranks begin with rank 0's parameters and buffers."""
        return module

    def rewrap(self, module: nn.Module) -> nn.Module:
        """The same after parameters were replaced or frozen; nothing is broadcast."""
        return module

    def end(self) -> None:
        """Drop whatever would keep the process group alive; the module is not used after it."""

    # -- a change of layers ----------------------------------------------------------------------

    @contextmanager
    def changing(self, module: nn.Module) -> Iterator[None]:
        """Around every change of layers; on exit the wrapper is renewed if a parameter has been replaced.

        After an exception the model is left as it is: layers that were changed are whole, and so are the others.
        """
        assert self._reshaped is None, "changes do not nest"
        self._reshaped = False
        try:
            yield
            if self._reshaped:
                self.model = self.rewrap(module)
        finally:
            self._reshaped = None

    def gather(self, target: TargetWeight) -> None:
        """Bring a layer's parameters to where ``layout`` says, before the method reads them; a collective call.

        They stay until :meth:`replacing` or :meth:`release`.
        """

    def release(self, target: TargetWeight) -> None:
        """Free what :meth:`gather` brought; nothing has been changed."""

    @contextmanager
    def replacing(self, target: TargetWeight) -> Iterator[None]:
        """Around new factors or values of a layer, only inside :meth:`changing`; a collective call.

        Inside, ``optimizer.state`` shows the state of ``target.trained``. On exit the engine takes over what the layer
        and the optimizer hold then.
        """
        assert self._reshaped is not None, "replacing() outside of changing()"
        before = target.trained
        self._gather_moments(before)
        yield
        if target.low_rank is not None:
            self._on_replace(target.low_rank)
        self._reshaped |= target.trained is not before

    def _gather_moments(self, parameter: nn.Parameter) -> None:
        """Bring a parameter's state to where ``optimizer.state`` shows it."""

    def _on_replace(self, layer: LowRankWeight) -> None:
        """The factors of ``layer`` are new, in value or as objects: drop the old ones."""

    # -- what a rank stores ----------------------------------------------------------------------

    def local_shard(self, parameter: nn.Parameter) -> Tensor:
        """What this rank stores of a parameter between steps."""
        return self.layout.local(parameter.detach())

    def any_rank(self, flags: Tensor) -> Tensor:
        """Findings about what is :meth:`local_shard`, above 0 where any rank has made one; in place."""
        return self.layout.add(flags)

    def basis_dtype(self, layer: LowRankWeight) -> torch.dtype:
        """In which dtype ``U`` and ``Vh`` are kept between steps, whatever :meth:`gather` shows them in."""
        return layer.U.dtype

    def extra_tensors(self) -> Iterable[Tensor]:
        """Tensors that live between steps beside the module and its optimizer."""
        return ()

    # -- what a user's loop may do beside it -----------------------------------------------------

    @property
    def ignored(self) -> Collection[int]:
        """Ids of parameters that ranks do not share, and which may therefore differ."""
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

    def check_step(self) -> None:
        """Raise :class:`ModelError` where an update could not be made by all ranks together."""

    def check_replicas(self, named: Mapping[str, Sequence[Tensor]]) -> None:
        """Raise :class:`ReplicaMismatchError` on every rank unless all hold equal bits of these tensors, by name."""

    # -- one step --------------------------------------------------------------------------------

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Context in which backward passes leave gradients local, to be summed by the next one outside."""
        return nullcontext()

    def backward(self, loss: Tensor, scaler: torch.amp.GradScaler) -> None:
        """Gradients of the mean loss over all ranks of ``data``."""
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

    def clip(self, parameters: Sequence[nn.Parameter], norm: float) -> None:
        """Scale gradients so that their joint 2-norm is at most ``norm``."""
        clip_grad_norm_(parameters, norm)

    # -- checkpoints -----------------------------------------------------------------------------

    def model_tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """The state dict to be saved, or to be filled in place: whole tensors, or DTensors as they are split.

        A collective call; second names of tied weights are left out.
        """
        return untied_state(module)

    def gather_state(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Bring all state to where ``optimizer.state`` shows it, whole or as DTensors; a collective call."""

    def scatter_state(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Take over what a checkpoint has put into the module and into ``optimizer.state``."""


class SingleEngine(Engine):
    """One process: the module itself, without a process group."""

    whole_factors = True

    def __init__(self, world: Peers | None = None) -> None:
        self.world = world or OneProcess()


def adopt(model: nn.Module) -> tuple[Engine, nn.Module]:
    """The engine that a user's model implies, and the module inside; a collective call where there are several ranks.

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
