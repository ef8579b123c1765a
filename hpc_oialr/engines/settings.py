"""Which engine a run gets: by settings, one type per engine, or by what a model is wrapped in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from hpc_oialr.distributed import World
from hpc_oialr.engines.ddp import DDPEngine
from hpc_oialr.engines.deepspeed import DeepSpeedEngine
from hpc_oialr.engines.deepspeed_json import read_config
from hpc_oialr.engines.fsdp import FSDPEngine
from hpc_oialr.engines.tensor.engine import TensorEngine
from hpc_oialr.errors import ConfigError, check_interval
from hpc_oialr.method.engine import Engine, SingleEngine


def make_engine(world: World, **ddp_options: Any) -> Engine:
    """:class:`SingleEngine` for one process, for more a :class:`DDPEngine` with these options."""
    return SingleEngine(world) if world.size == 1 else DDPEngine(world, **ddp_options)


def engine_of(model: nn.Module) -> tuple[Engine, nn.Module]:
    """The engine for a user's model, and the module inside; a collective call.

    A model in ``DistributedDataParallel`` keeps its group and options, one sharded by ``fully_shard`` its mesh; a plain
    one uses the existing process group.
    """
    if isinstance(model, DistributedDataParallel):
        return DDPEngine.adopting(model), model.module
    if isinstance(model, FSDPModule):
        return FSDPEngine.adopting(model), model
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, DistributedDataParallel):
        return DDPEngine.adopting(compiled, outer=model), compiled.module
    return make_engine(World.current()), model


class EngineConfig(ABC):
    """Settings of one engine. One process alone needs none: every engine is then :class:`SingleEngine`."""

    # Values of ``oialr.importance`` for which layers see enough, on several ranks.
    importances: ClassVar[Sequence[str]] = Engine.importances

    def build(self, world: World, precision: str) -> Engine:
        """The engine of these ranks, in the run's ``precision`` ("fp32", "bf16", "bf16-params", "fp16" or "float64").

        Raises :class:`ConfigError` if it cannot run on so many ranks.
        """
        self.shares(world.size)
        return SingleEngine(world) if world.size == 1 else self._of_many(world, precision)

    def shares(self, processes: int) -> int:
        """Number of shards of a global batch; a :class:`ConfigError` if it cannot run on so many."""
        return processes

    @abstractmethod
    def _of_many(self, world: World, precision: str) -> Engine:
        """The engine of two ranks or more."""


@dataclass(kw_only=True)
class Single(EngineConfig):
    """One process, no process group; more are an error."""

    def shares(self, processes: int) -> int:
        """One."""
        if processes > 1:
            rule = f"is for one process, and {processes} were started"
            raise ConfigError("engine", "Single", rule, fix="Take DDP or FSDP.")
        return 1

    def _of_many(self, world: World, precision: str) -> Engine:
        raise AssertionError("shares() has refused it")


@dataclass(kw_only=True)
class DDP(EngineConfig):
    """``DistributedDataParallel``: every rank holds the whole model.

    Parameters
    ----------
    find_unused_parameters
        Needed if a step may leave parameters without a gradient.
    gradient_as_bucket_view
        Gradients live in the communication buffers: no copy of them.
    bucket_cap_mb
        Size of a buffer (MiB); null: an eighth of what is trained, from 1 to 25 MiB, updated whenever r changes.
    """

    find_unused_parameters: bool = False
    gradient_as_bucket_view: bool = True
    bucket_cap_mb: float | None = None

    def __post_init__(self) -> None:
        if self.bucket_cap_mb is not None:
            check_interval("bucket_cap_mb", self.bucket_cap_mb, 0, float("inf"))

    def _of_many(self, world: World, precision: str) -> Engine:
        return DDPEngine(world, **asdict(self))


@dataclass(kw_only=True)
class DeepSpeed(EngineConfig):
    """DeepSpeed's ZeRO, with AdamW and other optimizers whose step is elementwise.

    Parameters
    ----------
    config
        Path of a DeepSpeed JSON; values that are "auto" are filled in, batch sizes, clipping and precision
        must agree with the recipe's, an "optimizer" or "scheduler" section is an error: the recipe has both.
        Buffers whose size it leaves open are sized by the model, at most as DeepSpeed would.
    stage
        ZeRO stage where there is no JSON: 1 shards optimizer state over ranks, 2 gradients too, 3 parameters too.
    """

    config: str | None = None
    importances = DeepSpeedEngine.importances
    stage: Literal[1, 2, 3] = 2

    def _of_many(self, world: World, precision: str) -> Engine:
        if precision in ("float64", "bf16-params"):
            rule = "must be fp32, bf16 or fp16 under DeepSpeed"
            fix = "Take DDP." if precision == "float64" else "Take bf16, in which it stores the module in bf16."
            raise ConfigError("train.precision", precision, rule, fix=fix)
        zero = {"zero_optimization": {"stage": self.stage}}
        given = zero if self.config is None else read_config(self.config)
        return DeepSpeedEngine(world, given, precision=precision, origin=self.config or "engine.stage")


@dataclass(kw_only=True)
class FSDP(EngineConfig):
    """FSDP2: parameters, gradients and optimizer state in shards, gathered block by block for use.

    Parameters
    ----------
    replicas
        Groups that hold the whole model each (HSDP), e.g. one a node; 1 = shards over all ranks.
    reshard_after_forward
        Free a block's gathered parameters after its forward pass, and gather them again in the backward.
    frozen
        Where the bases ``U`` and ``Vh`` of low-rank layers are: "sharded", and gathered for use like all parameters; or
        "replicated", whole on every rank: r (m + n) numbers a layer, which no step has to send.
    """

    replicas: int = 1
    reshard_after_forward: bool = True
    frozen: Literal["sharded", "replicated"] = "sharded"

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigError("replicas", self.replicas, "must be at least 1")

    def shares(self, processes: int) -> int:
        """One per rank."""
        if processes > 1 and processes % self.replicas:
            raise ConfigError("replicas", self.replicas, f"must divide the {processes} ranks")
        return processes

    def _of_many(self, world: World, precision: str) -> Engine:
        half = {"bf16": torch.bfloat16, "bf16-params": torch.bfloat16, "fp16": torch.float16}
        return FSDPEngine(world, **asdict(self), gather_dtype=half.get(precision))


@dataclass(kw_only=True)
class TensorParallel(EngineConfig):
    """Each layer split over several ranks, which work on the same samples.

    Parameters
    ----------
    size
        Processes to a model, at best those of one node; must divide the number of processes.
    bucket_cap_mb
        Gradients travel between models joined up to this size (MiB).
    """

    importances = TensorEngine.importances
    size: int = 2
    bucket_cap_mb: float = 25.0

    def __post_init__(self) -> None:
        if self.size < 2:
            fix = "Take DDP for one process to a model."
            raise ConfigError("size", self.size, "must be at least 2", fix=fix)
        check_interval("bucket_cap_mb", self.bucket_cap_mb, 0, float("inf"))

    def shares(self, processes: int) -> int:
        """One per group of ranks that computes a model."""
        if processes > 1 and processes % self.size:
            raise ConfigError("size", self.size, f"must divide the {processes} ranks")
        return max(1, processes // self.size)

    def _of_many(self, world: World, precision: str) -> Engine:
        if precision == "fp16":
            rule = "cannot be used with TensorParallel, whose ranks would each choose a loss scale"
            raise ConfigError("train.precision", "fp16", rule, fix="Take bf16.")
        return TensorEngine(world, size=self.size, bucket_mb=self.bucket_cap_mb)
