"""The interface between the method and the engine that runs the model, and the engine of a single process.

Engines of several ranks (:mod:`hpc_oialr.engines`) are only imported when a model is wrapped or a process group exists.
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
from hpc_oialr.method.config import IMPORTANCES
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


class Peers(Protocol):
    """The ranks of the model, as the method sees them; :class:`hpc_oialr.distributed.World` implements it.

    The bodies are those of a single process.
    """

    @property
    def rank(self) -> int:
        """This process."""
        return 0

    @property
    def size(self) -> int:
        """Number of ranks."""
        return 1

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Their process group; None for a single process."""
        return None

    def broadcast(self, tensor: Tensor, src: int) -> Any:
        """Start to send ``tensor`` from rank ``src`` into every other's: what to ``wait()`` for, or None."""
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


class _OneProcess(Peers):
    """A single process."""


class Engine:
    """How the ranks of a run store one model and share its gradients; the defaults are those of a single process.

    Order of calls: :meth:`place` a new module, make the optimizer, :meth:`wrap` both; then in every step the wrapped
    module's forward, :meth:`backward`, :meth:`update`. The method changes layers inside :meth:`changing`: it calls
    :meth:`gather` before it reads a layer, and sets new factors and moments inside :meth:`replacing`.
    """

    world: Peers  # all ranks
    layout: Replicated = REPLICATED  # how one matrix is stored
    whole_factors: bool = False  # whether each rank always has all of U, S and Vh, in ordinary tensors
    importances: Sequence[str] = IMPORTANCES  # values of OIALRConfig.importance for which layers see enough
    whole_features: bool = True  # whether layers see whole inputs, and whole gradients of their outputs
    steps_itself: bool = False  # whether the optimizer given to wrap() never steps
    casts_itself: bool = False  # whether forward passes use parameters in the dtype of the run's precision anyway
    pairs: Sequence[Any] = ()  # of layers between which features may stay sharded; set before place()
    model: nn.Module  # what the user calls in the loop: the last result of wrap() or rewrap()
    wrapper: nn.Module | None = None  # the DistributedDataParallel that is kept up to date, if any
    _reshaped: bool | None = None  # whether a parameter was replaced; None outside of changing()

    @property
    def data_parallel(self) -> Peers:
        """The ranks over which a global batch is sharded; all, unless several compute the same samples."""
        return self.world

    @property
    def whole_bases(self) -> bool:
        """Whether each rank always has all of U and Vh, in ordinary tensors; of cores it may have a shard."""
        return self.whole_factors

    @property
    def replicas(self) -> Peers:
        """The ranks that must store the same bits as this one."""
        return self.world

    # -- setup and end ---------------------------------------------------------------------------

    def expect(self, *, global_batch: int, accumulation: int, clip: float | None) -> None:
        """Raise :class:`ConfigError` if the engine's own settings for a step differ from these."""

    def scale_steps(self, factors: Mapping[nn.Parameter, float]) -> None:
        """Multiply each core's step by its factor, where hooks on the optimizer given to :meth:`wrap` never run."""

    def place(self, module: nn.Module) -> None:
        """Send or shard the parameters of a new module, in place; before the optimizer is made."""

    def wrap(self, module: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
        """What to call in the loop; all ranks start from rank 0's parameters and buffers."""
        return module

    def rewrap(self, module: nn.Module) -> nn.Module:
        """:meth:`wrap` again after parameters were replaced or frozen; nothing is broadcast."""
        return module

    def end(self) -> None:
        """Free everything that would keep the process group alive; the module is not used afterwards."""

    # -- a change of layers ----------------------------------------------------------------------

    @contextmanager
    def changing(self, module: nn.Module) -> Iterator[None]:
        """Around every change of layers; on exit the wrapper is rebuilt if a parameter was replaced.

        After an exception each layer is either unchanged or completely changed.
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
        """Gather a layer's parameters as ``layout`` says, until :meth:`replacing` or :meth:`release`; collective."""

    def release(self, target: TargetWeight) -> None:
        """Free what :meth:`gather` brought; nothing has been changed."""

    @contextmanager
    def replacing(self, target: TargetWeight) -> Iterator[None]:
        """Around new factors or values of a layer, only inside :meth:`changing`; a collective call.

        Inside, ``optimizer.state`` has the state of ``target.trained``; on exit the engine stores what is new.
        """
        assert self._reshaped is not None, "replacing() outside of changing()"
        before = target.trained
        self._gather_moments(before)
        yield
        if target.low_rank is not None:
            self._on_replace(target.low_rank)
        self._reshaped |= target.trained is not before

    def rebuild_wrapper(self) -> None:
        """Have it rebuilt at the end of :meth:`changing`: other parameters are trained from now on."""
        assert self._reshaped is not None, "rebuild_wrapper() outside of changing()"
        self._reshaped = True

    def _gather_moments(self, parameter: nn.Parameter) -> None:
        """Put a parameter's state into ``optimizer.state``."""

    def _on_replace(self, layer: LowRankWeight) -> None:
        """Called when factors of ``layer`` have new values or are new objects."""

    # -- what a rank stores ----------------------------------------------------------------------

    def local_shard(self, parameter: nn.Parameter) -> Tensor:
        """What this rank stores of a parameter between steps."""
        return self.layout.local(parameter.detach())

    def any_rank(self, flags: Tensor) -> Tensor:
        """Flags about :meth:`local_shard`, above 0 where any rank's is; in place."""
        return self.layout.add(flags)

    def basis_dtype(self, layer: LowRankWeight) -> torch.dtype:
        """The dtype of ``U`` and ``Vh`` between steps, whichever :meth:`gather` gives."""
        return layer.U.dtype

    def extra_tensors(self) -> Iterable[Tensor]:
        """Tensors kept between steps besides the module's and the optimizer's."""
        return ()

    # -- checks of the user's loop ---------------------------------------------------------------

    @property
    def ignored(self) -> Collection[int]:
        """Ids of parameters whose gradients are not averaged, so that they may differ between ranks."""
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
        """Raise :class:`ModelError` where not all ranks would call :meth:`OIALR.step`."""

    def check_replicas(self, named: Mapping[str, Sequence[Tensor]]) -> None:
        """Raise :class:`ReplicaMismatchError` on every rank unless these tensors, by name, have equal bits on all."""

    # -- one step --------------------------------------------------------------------------------

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Context in which backward passes leave gradients local, to be summed by the next one outside."""
        return nullcontext()

    def backward(self, loss: Tensor, scaler: torch.amp.GradScaler) -> None:
        """Gradients of the mean loss over :attr:`data_parallel`."""
        scaler.scale(loss).backward()

    def update(
        self,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        parameters: Sequence[nn.Parameter],
        clip: float | None,
    ) -> None:
        """Clip the gradient of ``parameters`` to a 2-norm of ``clip``, step, and free gradients."""
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
        """The state dict to save or to fill in place, whole tensors or DTensors, one name per tied weight; collective."""
        return untied_state(module)

    def gather_state(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Put all state into ``optimizer.state``, whole or as DTensors; a collective call."""

    def scatter_state(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Use what a checkpoint has put into the module and into ``optimizer.state``."""


class SingleEngine(Engine):
    """A single process: the module itself, without a process group."""

    whole_factors = True

    def __init__(self, world: Peers | None = None) -> None:
        self.world = world or _OneProcess()


def require_not_torchft(part: object) -> None:
    """Raise :class:`ModelError` if a model or an optimizer is in a wrapper of torchft's."""
    if type(part).__module__.partition(".")[0] == "torchft":
        raise ModelError(
            f"{type(part).__name__} of torchft lets replicas leave, join and skip steps on their own; OIALR changes all "
            "of them in the same step, by sums over all. Use torch's DistributedDataParallel and the optimizer itself, "
            "with torchrun --max-restarts and checkpoints for processes that die."
        )


def adopt(model: nn.Module) -> tuple[Engine, nn.Module]:
    """The engine for a user's model, by its wrapper or process group, and the module inside; a collective call.

    Raises :class:`ModelError` if the model is in a wrapper whose parameters cannot be replaced.
    """
    kinds = [kind.__name__ for kind in type(model).__mro__]
    refused = next((kind for kind in kinds if kind in _REFUSED_WRAPPERS), None)
    if refused is not None:
        raise ModelError(
            f"the model is wrapped in {refused}; must be plain, in DistributedDataParallel or sharded by fully_shard: "
            f"{_REFUSED_WRAPPERS[refused]}."
        )
    require_not_torchft(model)
    if not _WRAPPERS.intersection(kinds) and not (dist.is_available() and dist.is_initialized()):
        return SingleEngine(), model
    found: tuple[Engine, nn.Module] = importlib.import_module(_ENGINES).engine_of(model)
    return found
