"""DeepSpeed's ZeRO around a module whose parameters are replaced now and then."""

from __future__ import annotations

import copy
import gc
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpc_oialr.engines.base import Engine
from hpc_oialr.engines.deepspeed_json import (
    Recipe,
    check_precision,
    check_recipe,
    check_sections,
    filled,
    stage_of,
)
from hpc_oialr.engines.deepspeed_library import import_deepspeed
from hpc_oialr.engines.row_blocks import row_block
from hpc_oialr.engines.zero_cores import CoreSteps
from hpc_oialr.engines.zero_partitions import MASTER, Part, Partitions
from hpc_oialr.errors import ModelError
from hpc_oialr.lowrank import Site, untied_state
from hpc_oialr.lowrank.base import LowRankWeight, whole_shape
from hpc_oialr.lowrank.layout import WHOLE
from hpc_oialr.processes import World

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Their step of one number depends on that number's own gradient and state only, so that they work on
# the flat pieces which ZeRO gives an optimizer.
ELEMENTWISE = (
    "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
)  # fmt: skip


class DeepSpeedEngine(Engine):
    """ZeRO 1, 2 and 3: optimizer state, gradients and parameters dealt over the processes.

    The optimizer given to :meth:`wrap` stays the one that the method, schedulers and checkpoints see.
    Between changes its state is empty: DeepSpeed steps an optimizer of the same type, whose options
    follow the given one's before every step. ``U`` and ``Vh`` are not in it; stage 3 deals them too.

    DeepSpeed takes hold of the model at the first forward pass; until then module and optimizer are
    ordinary ones, into which a checkpoint can be loaded.

    Parameters
    ----------
    world
        The processes; two or more, of the default process group.
    given
        Content of a DeepSpeed JSON; "auto" is filled in.
    precision
        "fp32", "bf16" or "fp16". In the latter two the module is in that dtype, ``U`` and ``Vh``
        included, and ZeRO holds the trained parameters in fp32; the run's autocast stays on.
    origin
        Where ``given`` is from, for messages.

    Attributes
    ----------
    builds
        How often DeepSpeed's engine was made.

    Notes
    -----
    A change of r rebuilds DeepSpeed's engine. Meanwhile each process keeps its own part of the fp32
    values and moments in host memory, and whole are only: the weights of at most as many layers as
    there are processes, the moments of one layer, and in stages 1 and 2 one tensor at a time when parts
    are dealt anew (two times its size sent). Stage 3 deals new factors at once, and moves no part of
    parameters that stay. DeepSpeed's constructor broadcasts the module's parameters once more.
    """

    layout = WHOLE

    def __init__(
        self,
        world: World,
        given: dict[str, Any],
        *,
        precision: str = "fp32",
        origin: str = "",
    ) -> None:
        self.stage = stage_of(given, origin)
        check_sections(given, origin)
        check_precision(given, precision, origin)
        self.world = world
        self.builds = 0
        self._given, self._precision, self._origin = given, precision, origin
        self._dtype = DTYPES[precision]
        self._library = import_deepspeed(world)
        self._factors: Mapping[nn.Parameter, float] = {}
        self._live: Any = None
        self._partitions: Partitions | None = None
        self._opened: dict[nn.Parameter, Tensor] = {}
        self._new: dict[nn.Parameter, Part] = {}

    @property
    def replicas(self) -> World:
        """The processes that store the same; under stage 3 each alone."""
        return self.world if self.stage < 3 or self._live is None else World(device=self.world.device)

    # -- the model's life ------------------------------------------------------------------------

    def expect(self, *, global_batch: int, accumulation: int, clip: float | None) -> None:
        """Compare the JSON with the recipe.

        Raises
        ------
        ConfigError
            If batch sizes or clipping differ.
        """
        check_recipe(self._given, Recipe(global_batch, accumulation, clip), self.world.size, self._origin)

    def scale_steps(self, factors: Mapping[nn.Parameter, float]) -> None:
        """Multiply the steps of these parameters; looked at whenever DeepSpeed's engine is made."""
        self._factors = factors

    def wrap(self, module: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
        """The module in what will make DeepSpeed's engine at its first call.

        Raises
        ------
        ModelError
            If the optimizer cannot step flat pieces of parameters.
        """
        self._template = _require_elementwise(optimizer)
        self._module = module
        self.world.share(tensor.data for tensor in [*module.parameters(), *module.buffers()])
        self._wrapped = _Wrapped(self, module)
        return self._wrapped

    def rewrap(self, module: nn.Module) -> nn.Module:
        """The same wrapper, around a new engine if there are new parameters."""
        if self._live is not None:
            if self._new:
                self._rebuild()
            self._template.state.clear()
        return self._wrapped

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The module inside."""
        return model.module if isinstance(model, _Wrapped) else model

    # -- making and ending DeepSpeed's engine ----------------------------------------------------

    def running(self) -> Any:
        """DeepSpeed's engine; made, on all processes, if there is none."""
        if self._live is None:
            self._build({p: self._taken(p) for p in self._trained()})
        return self._live

    @property
    def _zero(self) -> Any:
        return self._live.optimizer

    @property
    def _held(self) -> Partitions:
        assert self._partitions is not None
        return self._partitions

    def _trained(self) -> Iterator[nn.Parameter]:
        for group in self._template.param_groups:
            yield from (p for p in group["params"] if p.requires_grad)

    def _rebuild(self) -> None:
        parts = {
            p: self._new.pop(p) if p in self._new else self._held.part(p).kept() for p in self._trained()
        }
        self._end()
        self._build(parts)

    def _build(self, parts: dict[nn.Parameter, Part]) -> None:
        """Make DeepSpeed's engine over the present parameters, and put their values and moments into it."""
        total = sum(whole_shape(p).numel() for p in parts)
        self._live, *_ = self._library.initialize(
            model=self._module,
            optimizer=_twin(self._template),
            config=filled(self._given, self._precision, total),
            dist_init_required=False,
        )
        self._keep_autocast()
        scaler, self._scaler = getattr(self, "_scaler", None), self._zero.loss_scaler
        if scaler is not None:
            vars(self._scaler).update(vars(scaler))
        self._partitions = Partitions(self._zero, self.world)
        self._partitions.restore(parts)
        self._steps = CoreSteps(self._partitions, self._factors)
        self.builds += 1

    def _keep_autocast(self) -> None:
        """DeepSpeed would switch the run's autocast off in the forward pass; it stays on in evaluations."""
        if self._precision != "fp32":
            settings = self._live._config
            settings.torch_autocast_enabled, settings.torch_autocast_dtype = True, self._dtype

    def _end(self) -> None:
        """Take DeepSpeed's engine off the module, with everything that would keep its memory."""
        engine, self._live, self._partitions, self._steps = self._live, None, None, None  # type: ignore[assignment]
        engine.destroy()
        engine.module_forward_pre_hook.remove()
        engine.module_forward_post_hook.remove()
        for module in self._module.modules():
            # Classes made in the first life of a ZeRO-3 module, with its old parameters in their closures.
            for name in ("pre_bwd_fn", "post_bwd_fn"):
                module.__dict__.pop(name, None)
        del engine
        gc.collect()

    # -- a change of layers ----------------------------------------------------------------------

    @torch.no_grad()
    def open(self, site: Site) -> None:
        """Bring a layer's parameters to every process, whole, trained ones in fp32."""
        if self._live is None:
            return
        layer = site.low_rank
        for parameter in (site.weight,) if layer is None else layer.factors:
            if parameter not in self._opened:
                self._gather(parameter)

    def _gather(self, parameter: nn.Parameter) -> None:
        trained, shape = parameter in self._held.places, whole_shape(parameter)
        if self.stage == 3:
            _let_go(parameter)
        elif not trained or self._dtype == torch.float32:
            return
        self._opened[parameter] = parameter.data
        part = self._held.part(parameter) if trained else _frozen_part(parameter, self.world)
        parameter.data = part.whole(MASTER, shape, self.world)

    @torch.no_grad()
    def open_state(self, parameter: nn.Parameter) -> None:
        """Bring a parameter's moments to every process, whole."""
        if self._live is None:
            return
        part = self._held.part(parameter)
        moments = {
            key: part.whole(key, whole_shape(parameter), self.world) for key in part.values if key != MASTER
        }
        if moments or part.scalars:
            self._template.state[parameter] = moments | copy.deepcopy(part.scalars)

    def stored(self, parameter: nn.Parameter) -> Tensor:
        """Under ZeRO-3 this process's part, otherwise all."""
        part = getattr(parameter, "ds_tensor", parameter)
        return part.detach()

    def seen_by_any(self, flags: Tensor) -> Tensor:
        """One all-reduce."""
        return self.world.all_reduce(flags, op="max")

    def close(self, site: Site) -> None:
        """Let go of what :meth:`open` brought; nothing has been changed."""
        layer = site.low_rank
        for parameter in (site.weight,) if layer is None else layer.factors:
            if parameter in self._opened:
                parameter.data = self._opened.pop(parameter)

    @torch.no_grad()
    def follow(self, layer: LowRankWeight) -> None:
        """Put new values where DeepSpeed has them; deal new parameters, and free those that are gone."""
        if self._live is None:
            return
        donor = next(iter(self._opened), None)
        for parameter in layer.factors:
            if parameter in self._opened or parameter in self._held.places:
                self._put_back(parameter)
            elif parameter.requires_grad or self._is_new(parameter):
                self._adopt(parameter, donor)
        self._free_the_gone()

    def _is_new(self, frozen: nn.Parameter) -> bool:
        return (self.stage == 3 and not hasattr(frozen, "ds_id")) or frozen.dtype != self._dtype

    def _put_back(self, parameter: nn.Parameter) -> None:
        values, place = parameter.data, self._opened.pop(parameter, parameter.data)
        if parameter in self._held.places:
            self._held.write(parameter, _whole_state(parameter, self._template.state.pop(parameter, {})))
        if self.stage == 3:
            part = _frozen_part(parameter, self.world)
            flat = values.reshape(-1)[part.start : part.start + part.values[MASTER].numel()]
            parameter.ds_tensor.data[: flat.numel()].copy_(flat)  # type: ignore[attr-defined]
        elif place is not values:
            place.copy_(values)
        parameter.data = place

    def _adopt(self, parameter: nn.Parameter, donor: nn.Parameter | None) -> None:
        if parameter.requires_grad:
            self._new[parameter] = self._taken(parameter)
        parameter.data = parameter.data.to(self._dtype)
        if self.stage == 3:
            assert donor is not None
            donor.convert_to_zero_parameters(param_list=[parameter])  # type: ignore[attr-defined]

    def _free_the_gone(self) -> None:
        here = set(self._module.parameters())
        for parameter in [p for p in self._opened if p not in here]:
            parameter.data = self._opened.pop(parameter)

    def _taken(self, parameter: nn.Parameter) -> Part:
        """This process's part of an ordinary parameter and of its state, which leaves the optimizer."""
        state = self._template.state.pop(parameter, {})
        tensors = _whole_state(parameter, state)
        scalars = {key: value for key, value in state.items() if key not in tensors}
        return Part.own(tensors, scalars, self.world).kept()

    # -- one step --------------------------------------------------------------------------------

    @contextmanager
    def _local(self) -> Iterator[None]:
        engine = self.running()
        engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            engine.set_gradient_accumulation_boundary(True)

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """The step goes on after the next backward pass; stages 2 and 3 sum gradients over processes in each."""
        return self._local()

    def backward(self, loss: Tensor, scaler: torch.amp.GradScaler) -> None:
        """DeepSpeed's backward pass, with its own loss scale, which ``scaler`` shows."""
        engine = self.running()
        if self._precision == "fp16" and scaler.get_scale() != self._shown:
            self._zero.loss_scaler.cur_scale = scaler.get_scale()
        engine.backward(loss)

    _shown = 65536.0  # GradScaler's first scale: what it has until a checkpoint says otherwise

    def update(
        self,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        parameters: Sequence[nn.Parameter],
        clip: float | None,
    ) -> None:
        """Clip and step; learning rates and other options are those of ``optimizer``'s groups."""
        engine = self.running()
        self._zero.clip_grad = clip or 0.0
        filled_groups = [group for group in self._template.param_groups if group["params"]]
        for ours, theirs in zip(filled_groups, self._held.inner.param_groups, strict=True):
            theirs.update({key: value for key, value in ours.items() if key != "params"})
        engine.step()
        if self._precision == "fp16":
            self._shown = float(self._zero.loss_scaler.cur_scale)
            scaler.load_state_dict(scaler.state_dict() | {"scale": self._shown})

    # -- checkpoints -----------------------------------------------------------------------------

    @torch.no_grad()
    def model_tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """fp32 values in row blocks, gathered one after another; buffers as they are."""
        tensors = untied_state(module)
        if self._live is None:
            return tensors
        parameters = dict(module.named_parameters())
        return {
            name: self._block(parameters[name]) if name in parameters else tensor
            for name, tensor in tensors.items()
        }

    def _block(self, parameter: nn.Parameter) -> Tensor:
        shape = whole_shape(parameter)
        if parameter in self._held.places:
            return row_block(self._held.part(parameter).whole(MASTER, shape, self.world), self.world)
        if self.stage < 3:
            return parameter.detach().float()
        _let_go(parameter)
        return row_block(_frozen_part(parameter, self.world).whole(MASTER, shape, self.world), self.world)

    @torch.no_grad()
    def gather_state(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Moments in row blocks, gathered one after another; :meth:`rewrap` drops them."""
        if self._live is None:
            return
        for parameter in self._trained():
            part = self._held.part(parameter)
            shape = whole_shape(parameter)
            blocks = {
                key: row_block(part.whole(key, shape, self.world), self.world)
                for key in part.values
                if key != MASTER
            }
            if blocks or part.scalars:
                optimizer.state[parameter] = blocks | copy.deepcopy(part.scalars)

    def scatter_state(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Nothing: module and optimizer are ordinary ones until the first step.

        Raises
        ------
        ModelError
            If there was one.
        """
        if self._live is not None:
            raise ModelError(
                "a checkpoint cannot be loaded after the first step under DeepSpeed; load it into a fresh run."
            )


class _Wrapped(nn.Module):
    """Calls DeepSpeed's engine, whichever it is at the time."""

    def __init__(self, engine: DeepSpeedEngine, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._engine = engine

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass."""
        return self._engine.running()(*args, **kwargs)


def _require_elementwise(optimizer: Optimizer | None) -> Optimizer:
    name = type(optimizer).__name__
    if optimizer is None or name not in ELEMENTWISE:
        raise ModelError(
            f"the optimizer is {name}; under DeepSpeed it must be one of {', '.join(ELEMENTWISE)}: ZeRO cuts matrices "
            "into flat pieces, whose numbers must be stepped one by one. Take the engine DDP or FSDP for Muon."
        )
    return optimizer


def _twin(template: Optimizer) -> Optimizer:
    """An optimizer of the same type, options and parameters, without state and hooks."""
    twin = copy.copy(template)
    twin.state = defaultdict(dict)
    twin.param_groups = [
        {**group, "params": list(group["params"])} for group in template.param_groups if group["params"]
    ]
    return twin


def _whole_state(parameter: nn.Parameter, state: dict[str, Any]) -> dict[str, Tensor]:
    """A parameter's values and its moments."""
    moments = {
        key: value
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape and key != "step"
    }
    return {MASTER: parameter.data, **moments}


def _let_go(parameter: Any) -> None:
    """Free the whole values that ZeRO-3 keeps of small parameters between uses."""
    if parameter.ds_status.name == "AVAILABLE":
        parameter.partition()


def _frozen_part(parameter: Any, world: World) -> Part:
    """Views of what ZeRO-3 has here of a parameter, in the module's dtype."""
    numel, length = whole_shape(parameter).numel(), parameter.partition_numel()
    start = min(numel, world.rank * length)
    values = parameter.ds_tensor.detach().narrow(0, 0, min(length, numel - start))
    return Part(start, {MASTER: values})
