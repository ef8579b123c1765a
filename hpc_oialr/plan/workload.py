"""What is planned: a recipe with the shapes of its data, the number of processes, the engine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from hpc_oialr.data import ArrayDataset, Batch, DataConfig, Splits
from hpc_oialr.data.base import CounterRNG
from hpc_oialr.distributed import World
from hpc_oialr.engines import DDP, FSDP, DeepSpeed, Engine, EngineConfig, Single, TensorParallel
from hpc_oialr.errors import ConfigError, DataError
from hpc_oialr.method.config import IMPORTANCES, OIALRConfig
from hpc_oialr.method.rules import RankRule
from hpc_oialr.train.config import RunConfig
from hpc_oialr.train.run_context import RunContext, make_run_context

# Training samples of data sets that are seldom on the machine a plan is made on.
KNOWN_SAMPLES = {"ImageFolder": 1_281_167, "CIFAR10": 50_000, "FashionMNIST": 60_000}
# Later than any step: events of the method happen on request.
NEVER = 10**8


@dataclass(frozen=True)
class Workload:
    """A recipe and the shapes of its data."""

    config: RunConfig
    sample: Batch  # one, without the batch dim; only shapes and dtypes count
    samples: int  # of the training data
    assumption: str | None = None  # what was assumed of the data, if they are not on this machine

    @classmethod
    def of(cls, config: RunConfig, samples: int | None = None) -> Workload:
        """Read the shapes from the data or, where they are not on this machine, from the recipe.

        ``samples`` default to those found, or ``KNOWN_SAMPLES``. Raises DataError if the data are missing, and
        neither the recipe nor ``samples`` says enough.
        """
        try:
            train = config.data.build().train
        except DataError as missing:
            return cls._without_data(config, samples, missing)
        sample = {key: value[0] for key, value in train.example(1).items()}
        return cls(config, sample, samples or len(train))

    @classmethod
    def _without_data(cls, config: RunConfig, samples: int | None, missing: DataError) -> Workload:
        data = config.data
        length = getattr(data, "sequence_length", None)
        side = getattr(data, "size", getattr(data, "image_size", None))
        if length is not None:
            tokens = torch.zeros(length, dtype=torch.int64)
            sample = {"input_ids": tokens, "labels": tokens}
        elif side is not None:
            pixels = torch.zeros(getattr(data, "num_channels", 3), side, side)
            sample = {"pixel_values": pixels, "labels": torch.tensor(0)}
        else:
            raise missing
        count = samples or KNOWN_SAMPLES.get(type(data).__name__)
        if count is None:
            raise DataError(f"{missing} Or say how many training samples there are: --samples N")
        if data.limit is not None:
            count = min(count, data.limit)
        return cls(config, sample, count, f"the data are not here: {count:,} training samples")

    def with_train(self, **changes: Any) -> Workload:
        """The same with other settings of the recipe's section ``train``."""
        return replace(self, config=replace(self.config, train=replace(self.config.train, **changes)))

    @property
    def total_steps(self) -> int:
        """Steps of the whole run; raises ConfigError if there are fewer samples than a global batch holds."""
        train = self.config.train
        if self.samples < train.global_batch:
            rule = f"must not exceed the {self.samples} samples of the data set"
            raise ConfigError("train.global_batch", train.global_batch, rule)
        return train.total_steps(self.samples // train.global_batch)

    def batch(self, size: int) -> Batch:
        """A batch of these shapes: noise, or zeros for integers (labels, tokens)."""
        double = self.config.train.precision == "float64"

        def many(one: Tensor) -> Tensor:
            if not one.is_floating_point():
                return torch.zeros(size, *one.shape, dtype=one.dtype)
            return torch.randn(size, *one.shape, dtype=torch.float64 if double else one.dtype)

        return {key: many(one) for key, one in self.sample.items()}

    def run_context(
        self,
        engine: Engine,
        *,
        batch: int,
        rule: RankRule | None = None,
        trained: bool = False,
        fake_data: bool = True,
    ) -> RunContext:
        """A run under a built engine, in which conversion and updates happen on request only.

        ``batch`` samples per process and step; ``rule`` instead of the recipe's; bases ``trained`` or frozen all along;
        made-up data, or the recipe's.
        """
        config, method = self.config, self.config.oialr
        if method is not None:
            method = replace(method, delay=NEVER, frequency=NEVER, rule=rule or method.rule)
            method = replace(method, stability_frequency=None, stability_threshold=None)
            grow = 0.0 if trained else method.grow
            method = replace(method, train="factors" if trained else "cores", bases_trained=[], grow=grow)
        global_batch = batch * engine.data_parallel.size
        data = cast(DataConfig, _FakeData(self, global_batch)) if fake_data else config.data
        built = cast(EngineConfig, _BuiltEngine(engine))
        train = replace(config.train, global_batch=global_batch, steps=10**9, workers=0)
        config = replace(config, oialr=method, train=train, data=data, engine=built, compile="off")
        return make_run_context(config, cast(World, engine.world))


@dataclass(frozen=True)
class _BuiltEngine:
    """Replaces the engine's settings."""

    engine: Engine

    def build(self, world: World, precision: str) -> Engine:
        return self.engine


@dataclass(frozen=True)
class _FakeData(ArrayDataset):
    """Replaces the data's settings; training and validation samples."""

    workload: Workload
    count: int
    on_device = "never"  # as in DataConfig

    def build(self) -> Splits:
        return Splits(self, self, None)

    def __len__(self) -> int:
        return self.count

    def gather(self, indices: Tensor, rng: CounterRNG | None = None) -> Batch:
        return self.workload.batch(len(indices))


@dataclass(frozen=True)
class Deployment:
    """Processes on nodes under an engine, and samples per process and step."""

    engine: EngineConfig = field(hash=False)  # mutable settings
    nodes: int
    per_node: int
    batch: int = 1

    @property
    def processes(self) -> int:
        """Of all nodes."""
        return self.nodes * self.per_node

    @property
    def groups(self) -> int:
        """Processes, or groups with the same samples, over which a global batch is distributed."""
        if isinstance(self.engine, TensorParallel) and self.processes > 1:
            return self.processes // self.engine.size
        return self.processes

    def importance(self, method: OIALRConfig) -> str:
        """What bases are chosen by under the engine; ConfigError for what it cannot gather."""
        known = self.engine.importances if self.processes > 1 else IMPORTANCES
        return method.importance_under(label(self.engine), known)

    @property
    def sharded(self) -> bool:
        """Whether the method's matrices are sharded, so that several ranks compute each SVD."""
        return isinstance(self.engine, (FSDP, TensorParallel)) and self.processes > 1

    @property
    def whole_bases(self) -> bool:
        """Whether the bases of sharded layers are whole on every rank."""
        return self.sharded and isinstance(self.engine, FSDP) and self.engine.frozen == "replicated"

    @property
    def bare(self) -> bool:
        """Whether a step is traced without the engine: DDP and DeepSpeed work on real tensors only."""
        return self.processes == 1 or isinstance(self.engine, (DDP, DeepSpeed))

    def incompatibility(self, global_batch: int, *, accumulation: int, optimizer: str) -> str | None:
        """Why the engine cannot work with so many processes and this batch, or None."""
        engine, groups = self.engine, self.groups
        if self.processes == 1:
            return None
        if isinstance(engine, Single):
            return "Single is for one process"
        if isinstance(engine, TensorParallel) and self.processes % engine.size:
            return f"TensorParallel needs a multiple of {engine.size} ranks"
        if isinstance(engine, DeepSpeed) and optimizer == "MuonAdamW":
            return "ZeRO cuts matrices into flat pieces, which Muon cannot step"
        if global_batch % groups or (global_batch // groups) % accumulation:
            nearest = max(1, round(global_batch / (groups * accumulation))) * groups * accumulation
            return f"{global_batch} samples cannot be distributed over {groups} ranks; {nearest} can, or take --weak"
        return None


def label(engine: EngineConfig) -> str:
    """An engine's name, with the setting that matters most.

    Examples
    --------
    >>> label(DDP()), label(TensorParallel(size=4))
    ('DDP', 'TensorParallel size 4')
    """
    name = type(engine).__name__
    setting = {"TensorParallel": "size", "DeepSpeed": "stage", "FSDP": "replicas"}.get(name)
    value = getattr(engine, setting) if setting else 1
    return name if value == 1 and name != "DeepSpeed" else f"{name} {setting} {value}"


def all_engines(per_node: int) -> list[EngineConfig]:
    """One of each kind, tensor parallelism within a node."""
    tensor: list[EngineConfig] = [TensorParallel(size=per_node)] if per_node > 1 else []
    return [DDP(), FSDP(), *tensor, *(DeepSpeed(stage=stage) for stage in (1, 2, 3))]
