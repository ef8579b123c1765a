"""DeepSpeed's ZeRO around a module whose parameters are replaced during the run."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from hpc_oialr.distributed import World
from hpc_oialr.engines.base import GroupEngine
from hpc_oialr.engines.deepspeed_json import ZeroConfig
from hpc_oialr.engines.zero_live import MASTER, LiveZero, Part
from hpc_oialr.errors import MissingExtraError, ModelError
from hpc_oialr.lowrank import TargetWeight, untied_state
from hpc_oialr.lowrank.base import LowRankWeight, whole_shape
from hpc_oialr.lowrank.layout import Sharded

# Optimizers whose step is elementwise, so that they work on ZeRO's flat pieces.
ELEMENTWISE = (
    "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
)  # fmt: skip

# Called by DeepSpeed 0.19, deprecated in torch 2.13.
_DEPRECATED = (
    "`torch.jit.script",
    "`torch.distributed.all_gather_into_tensor` is deprecated",
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
)


class DeepSpeedEngine(GroupEngine):
    """ZeRO 1, 2 and 3: optimizer state, gradients and parameters sharded over ranks.

    The method, schedulers and checkpoints use the optimizer given to :meth:`wrap`, which has no state between changes:
    DeepSpeed steps an optimizer of the same type, whose options are copied from the given one before every step. ``U``
    and ``Vh`` are not in it; stage 3 shards them too. DeepSpeed's engine is made at the first forward pass; until then
    module and optimizer are ordinary ones, into which a checkpoint can be loaded.

    ``world`` are all ranks of the default process group, two or more; ``given`` is the content of a DeepSpeed JSON, in
    which "auto" is filled in, and ``origin`` its path, for messages. In ``precision`` "bf16" and "fp16" the module is in
    that dtype, ``U`` and ``Vh`` included, and ZeRO stores the trained parameters in fp32; the run's autocast stays on.

    Notes
    -----
    Stage 3 in fp32 with Adam stores parameter, gradient and two moments, 16 bytes a number over P, and a bucket of
    1/32 of the trained numbers; in bf16 2 + 2 + 12 bytes. In a step at most 1/8 of the model is gathered, or one layer.

    A change of r rebuilds DeepSpeed's engine, with each rank's shard of fp32 values and moments in host memory
    meanwhile. Whole on a rank are only the weights of at most as many layers (on GPUs batches) as there are ranks, the
    moments of one layer, and in stages 1 and 2 one tensor at a time while shards move (two times its size sent).
    """

    steps_itself = True
    # Stage 3 has not gathered U yet when a layer's gradient arrives.
    importances = ("weights", "inputs")

    def __init__(self, world: World, given: dict[str, Any], *, precision: str = "fp32", origin: str = "") -> None:
        self._json = ZeroConfig(given, precision, origin)
        self.stage = self._json.stage
        self.world = world
        self.builds = 0  # how often DeepSpeed's engine was made
        self._precision = precision
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self._library = import_deepspeed(world)
        self._factors: Mapping[nn.Parameter, float] = {}
        self._live: LiveZero | None = None
        self._loss_scaler: Any = None
        self._shown = 2.0**16  # what a GradScaler has until a checkpoint says otherwise

    @property
    def replicas(self) -> World:
        """The ranks that store the same; each alone where stage 3 has sharded the parameters."""
        return self.world if self.stage < 3 or self._live is None else World(device=self.world.device)

    def expect(self, *, global_batch: int, accumulation: int, clip: float | None) -> None:
        """Raise :class:`ConfigError` if the JSON's batch sizes or clipping are not the recipe's."""
        self._json.check_step(ranks=self.world.size, global_batch=global_batch, accumulation=accumulation, clip=clip)

    def scale_steps(self, factors: Mapping[nn.Parameter, float]) -> None:
        """Multiply the steps of these parameters; read whenever DeepSpeed's engine is made."""
        self._factors = factors

    def wrap(self, module: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
        """A wrapper that makes DeepSpeed's engine at its first call."""
        name = type(optimizer).__name__
        if optimizer is None or name not in ELEMENTWISE:
            raise ModelError(
                f"the optimizer is {name}; under DeepSpeed it must be one of {', '.join(ELEMENTWISE)}: ZeRO cuts "
                "matrices into flat pieces, whose numbers must be stepped one by one. Take the engine DDP or FSDP for "
                "Muon."
            )
        self._template, self._module = optimizer, module
        self.send_initial(module)
        self._wrapped = _Wrapped(self, module)
        return self._wrapped

    def rewrap(self, module: nn.Module) -> nn.Module:
        """The same wrapper, with a new engine if there are new parameters."""
        live = self._live
        if live is not None:
            if live.new:
                parts = live.parts(self._trained())
                self._loss_scaler, self._live = live.zero.loss_scaler, None
                live.end()
                self._build(parts)
            self._template.state.clear()
        return self._wrapped

    def end(self) -> None:
        """Remove DeepSpeed from the module, and forget its process groups."""
        if self._live is not None:
            live, self._live = self._live, None
            live.end()
            for parameter in self._module.parameters():
                vars(parameter).clear()
        forget_groups()

    def running(self) -> LiveZero:
        """DeepSpeed's engine; made, on all ranks, if there is none."""
        if self._live is None:
            self._build({p: Part.taken(p, self._template, self.world) for p in self._trained()})
        assert self._live is not None
        return self._live

    def _trained(self) -> Iterator[nn.Parameter]:
        for group in self._template.param_groups:
            yield from (p for p in group["params"] if p.requires_grad)

    def _build(self, parts: dict[nn.Parameter, Part]) -> None:
        """Make DeepSpeed's engine for the present parameters, with these values and moments."""
        trained, everything = (
            sum(whole_shape(p).numel() for p in group) for group in (parts, self._module.parameters())
        )
        # An optimizer of the same type, options and parameters, without state and hooks.
        twin = copy.copy(self._template)
        twin.state = defaultdict(dict)
        groups = [group for group in self._template.param_groups if group["params"]]
        twin.param_groups = [{**group, "params": list(group["params"])} for group in groups]
        engine, *_ = self._library.initialize(
            model=self._module,
            optimizer=twin,
            config=self._json.filled(trained=trained, parameters=everything),
            dist_init_required=False,
        )
        if self._precision != "fp32":
            # DeepSpeed would switch the run's autocast off in the forward pass, where evaluations have it on.
            engine._config.torch_autocast_enabled, engine._config.torch_autocast_dtype = True, self._dtype
        self._live = LiveZero(engine, self._module, self.world, self._dtype)
        self._live.restore(parts)
        if self._loss_scaler is not None:
            vars(self._live.zero.loss_scaler).update(vars(self._loss_scaler))
        self._live.stretch_steps(self._factors)
        self.builds += 1

    @torch.no_grad()
    def gather(self, target: TargetWeight) -> None:
        """Gather a layer's parameters, whole on every rank, trained ones in fp32."""
        if self._live is not None:
            for parameter in _parameters(target):
                self._live.gather(parameter)

    @torch.no_grad()
    def _gather_moments(self, parameter: nn.Parameter) -> None:
        """Gather a parameter's moments, whole on every rank."""
        if self._live is not None and (state := self._live.state(parameter)):
            self._template.state[parameter] = state

    def release(self, target: TargetWeight) -> None:
        """Free what :meth:`gather` gathered; nothing has been changed."""
        if self._live is not None:
            for parameter in _parameters(target):
                self._live.release(parameter)

    @torch.no_grad()
    def _on_replace(self, layer: LowRankWeight) -> None:
        """Copy new values into DeepSpeed's storage, shard new parameters, free old ones."""
        if self._live is not None:
            self._live.on_replace(layer, self._template)

    def local_shard(self, parameter: nn.Parameter) -> Tensor:
        """In stage 3 this rank's shard, without the uninitialised padding; otherwise all."""
        if hasattr(parameter, "ds_tensor"):
            return Part.frozen(parameter, self.world).values[MASTER]
        return parameter.detach()

    def any_rank(self, flags: Tensor) -> Tensor:
        """One all-reduce."""
        return self.world.all_reduce(flags, op="max")

    def basis_dtype(self, layer: LowRankWeight) -> torch.dtype:
        """The module's, in which DeepSpeed stores all parameters."""
        return layer.U.dtype if self._precision == "fp32" else self._dtype

    def extra_tensors(self) -> Iterable[Tensor]:
        """What DeepSpeed stores beside the module."""
        return () if self._live is None else self._live.extra_tensors()

    @contextmanager
    def no_sync(self, wrapped: nn.Module) -> Iterator[None]:
        """Accumulate gradients; stages 2 and 3 reduce them over ranks in every backward pass."""
        engine = self.running().engine
        engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            engine.set_gradient_accumulation_boundary(True)

    def backward(self, loss: Tensor, scaler: torch.amp.GradScaler) -> None:
        """DeepSpeed's backward pass, with its own loss scale; that of ``scaler`` if a checkpoint changed it."""
        live = self.running()
        if self._precision == "fp16" and scaler.get_scale() != self._shown:
            live.zero.loss_scaler.cur_scale = self._shown = scaler.get_scale()
        live.engine.backward(loss)

    def update(
        self,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        parameters: Sequence[nn.Parameter],
        clip: float | None,
    ) -> None:
        """Clip and step; learning rates and other options are those of ``optimizer``'s groups."""
        live = self.running()
        live.zero.clip_grad = clip or 0.0
        ours = [group for group in optimizer.param_groups if group["params"]]
        for group, twin in zip(ours, live.inner.param_groups, strict=True):
            twin.update({key: value for key, value in group.items() if key != "params"})
        live.engine.step()
        if self._precision == "fp16":
            self._shown = float(live.zero.loss_scaler.cur_scale)
            scaler.load_state_dict(scaler.state_dict() | {"scale": self._shown})

    @cached_property
    def _rows(self) -> Sharded:
        """Row blocks over all ranks, for checkpoints too large for one rank."""
        return Sharded(init_device_mesh(self.world.device.type, (self.world.size,)))

    def _row_block(self, whole: Tensor) -> Tensor:
        """This rank's rows; a scalar stays whole."""
        if not whole.dim():
            return whole
        return self._rows.put(whole[self._rows.own_rows(len(whole))], 0, whole.shape)

    @torch.no_grad()
    def model_tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """fp32 values in row blocks, gathered one after another; buffers as they are."""
        tensors = untied_state(module)
        if self._live is None:
            return tensors
        for name, parameter in module.named_parameters():
            tensors[name] = self._row_block(self._live.whole(parameter))
        return tensors

    @torch.no_grad()
    def gather_state(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Moments in row blocks, gathered one after another; :meth:`rewrap` drops them."""
        if self._live is None:
            return
        for parameter in self._trained():
            if state := self._live.state(parameter, self._row_block):
                optimizer.state[parameter] = state

    def scatter_state(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Nothing: a checkpoint is loaded into the ordinary module and optimizer, before the first step only."""
        if self._live is not None:
            raise ModelError(
                "a checkpoint cannot be loaded after the first step under DeepSpeed; load it into a fresh run."
            )


class _Wrapped(nn.Module):
    """Calls DeepSpeed's present engine."""

    def __init__(self, engine: DeepSpeedEngine, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._engine = engine

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine.running().engine(*args, **kwargs)


def _parameters(target: TargetWeight) -> tuple[nn.Parameter, ...]:
    layer = target.low_rank
    return (target.weight,) if layer is None else layer.factors


def import_deepspeed(world: World) -> Any:
    """The module ``deepspeed``, prepared for the ranks of ``world``; :class:`MissingExtraError` without it.

    Only its errors are logged: it warns of each optimizer that is not on its list. On CPUs it would compile a
    shared-memory all-reduce at the first start (over a minute); gloo does the same without it.
    """
    # It reads these from the environment, whichever launcher started the processes.
    place = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": world.local_rank}
    if world.device.type == "cpu":
        # The number of "devices" on a node; without it each gradient reduction starts a numactl process.
        place["LOCAL_SIZE"] = world.local_size
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in place.items():
        os.environ.setdefault(name, str(value))
    for message in _DEPRECATED:
        warnings.filterwarnings("ignore", message=message)
    try:
        import deepspeed
    except ImportError as error:
        raise MissingExtraError("deepspeed", "deepspeed", purpose="the engine DeepSpeed") from error
    if world.device.type == "cpu":
        # Its table of operations that it can compile, which it would fill by running the compiler.
        deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def forget_groups() -> None:
    """Empty DeepSpeed's tables of process groups, which it would use again in a next run."""
    from deepspeed.comm import comm
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.utils import groups

    comm.cdb = None
    parameter_offload.FWD_MODULE_STACK.clear()
    for name, value in list(vars(groups).items()):
        if isinstance(value, dist.ProcessGroup):
            setattr(groups, name, None)
        elif name.startswith("_") and name.endswith("GROUP") and isinstance(value, dict):
            value.clear()
