"""All objects of a run, made in a fixed order, for reproducibility."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpc_oialr.data import Batch, GlobalBatches, Splits
from hpc_oialr.distributed import World
from hpc_oialr.errors import ConfigError, ModelError
from hpc_oialr.lowrank import Selection, select
from hpc_oialr.method.engine import Engine, Peers
from hpc_oialr.method.oialr import OIALR
from hpc_oialr.method.participants import trained_targets
from hpc_oialr.method.report import StepReport, UpdateReport
from hpc_oialr.method.stability_tracker import StabilityTracker
from hpc_oialr.optim.stack import OptimizerStack
from hpc_oialr.train.compilation import compile_model
from hpc_oialr.train.config import RunConfig
from hpc_oialr.train.passes import Passes, is_image
from hpc_oialr.train.schedules import LearningRates

log = logging.getLogger(__name__)


class Dense:
    """Training without the method, with the interface of :class:`hpc_oialr.OIALR`.

    Every ``frequency`` steps it measures how stable the layers' bases are; never if that is None.
    """

    gathered: tuple[Tensor, ...] = ()

    def __init__(self, model: nn.Module, optimizer: Optimizer, engine: Engine, *, frequency: int | None = None) -> None:
        self.module, self.engine, self.t, self.frequency = model, engine, 0, frequency
        stack = OptimizerStack(optimizer)
        self.targets = trained_targets(select(model, Selection()), stack) if frequency else []
        self.layers = [target.name for target in self.targets]
        self.r: dict[str, int] = {}
        self._tracker = StabilityTracker(self.targets, engine, threshold=None)
        self.model = engine.wrap(model, optimizer)

    def no_sync(self) -> AbstractContextManager[None]:
        """Context in which gradients stay local."""
        return self.engine.no_sync(self.model)

    def step(self) -> UpdateReport | None:
        """Count, and measure when due."""
        self.t += 1
        report = StepReport(self.t, self.engine.world.size)
        if self.targets and self.frequency is not None and self.t % self.frequency == 0:
            with report.part("stability", self.targets) as layers:
                layers += self._tracker.measure(self.targets)
        return report.result()

    def rewrap(self) -> None:
        """Make a new wrapper, in the state that a resumed run starts with."""
        self.model = self.engine.rewrap(self.module)

    def state_dict(self) -> dict[str, Any]:
        """The method's state before its first update."""
        return {"t": self.t, "updates": 0, "r": {}, "streaks": {}}

    def tensor_state(self) -> dict[str, Tensor]:
        """The bases kept for the next measurement; a collective call."""
        return self._tracker.bases(self.targets)

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        """Load :meth:`state_dict`; ModelError if it is a low-rank run's."""
        if state["r"]:
            raise ModelError("the checkpoint is that of a low-rank run, but oialr is null here.")
        self.t = int(state["t"])
        self._tracker.restore(tensors or {}, state["streaks"])


@dataclass
class RunContext:
    """The parts of a run."""

    config: RunConfig
    world: World
    splits: Splits
    batches: GlobalBatches  # batches.epoch(e, start) gives this rank's part
    controller: Dense | OIALR  # holds the model
    optimizer: Optimizer
    rates: LearningRates
    scaler: torch.amp.GradScaler  # disabled unless the precision is fp16
    total_steps: int
    identity: dict[str, Any]  # class of the dense model, shape and dtype of every parameter and buffer
    example: dict[str, Any]  # shape and dtype of every tensor of a small batch, for which the model was made
    units_per_step: int  # images, tokens or windows of a global batch
    channels_last: bool = False  # whether images reach the model with their channels last

    @property
    def engine(self) -> Engine:
        """How ranks share the work."""
        return self.controller.engine

    @property
    def module(self) -> nn.Module:
        """The model without wrappers."""
        return self.controller.module

    @property
    def passes(self) -> Passes:
        """How a forward pass computes."""
        return Passes(
            self.world.device, self.config.train.precision, self.channels_last, casts_itself=self.engine.casts_itself
        )

    @torch.no_grad()
    def share_buffers(self) -> None:
        """Copy rank 0's buffers to all ranks, as ``DistributedDataParallel`` does before each forward."""
        self.world.share(self.module.buffers())


def make_run_context(config: RunConfig, world: World) -> RunContext:
    """Load the data, then make model, optimizer and method from the run's seed.

    ConfigError, DataError or ModelError if settings, data, world and model do not fit each other.
    """
    train = config.train
    with _section("data"):
        splits = config.data.build()
        if splits.validation is None and splits.test is None:
            rule = "leaves neither validation nor test data"
            raise ConfigError("class_path", type(config.data).__name__, rule)
    with _section("engine"):
        engine = config.engine.build(world, train.precision)
        engine.expect(global_batch=train.global_batch, accumulation=train.accumulation, clip=train.gradient_clip)
    peers = engine.data_parallel
    with _section("train"):
        train.check_accumulation(peers.size)
        batches = GlobalBatches(
            splits.train,
            train.global_batch,
            world_rank=peers.rank,
            world_size=peers.size,
            seed=train.seed,
            training=True,
            num_workers=train.workers,
            pin_memory=peers.device.type == "cuda",
        )
    total = train.total_steps(len(batches))
    if config.oialr is not None:
        config = replace(config, oialr=config.oialr.in_steps(total))
    torch.manual_seed(train.seed)
    sample = splits.train.example(2)
    config.task.check(sample, splits.classes, config.model)
    with _section("model"):
        module = config.model.build(sample)
    channels_last = wants_channels_last(config, module, sample, world.device)
    _prepare_model(module, config, world, peers)
    splits.keep_on(world.device, config.data.on_device)
    # Before the engine shards tensors and changes the class.
    tensors = {name: [list(t.shape), str(t.dtype)] for name, t in module.state_dict().items()}
    identity = {"class": type(module).__name__, "tensors": tensors}
    engine.pairs = config.model.pairs
    engine.place(module)
    optimizer = config.optimizer.build(module)
    rates = config.schedule.build(optimizer, total, len(batches))
    controller = _controller(config, engine, module, optimizer, total)
    seed_process(train.seed, 0, peers.rank)
    scaler = torch.amp.GradScaler(world.device.type, enabled=train.precision == "fp16")
    return RunContext(
        config=config,
        world=world,
        splits=splits,
        batches=batches,
        controller=controller,
        optimizer=optimizer,
        rates=rates,
        scaler=scaler,
        total_steps=total,
        identity=identity,
        units_per_step=config.task.count(sample) * train.global_batch // len(next(iter(sample.values()))),
        example={key: [list(t.shape), str(t.dtype).removeprefix("torch.")] for key, t in sample.items()},
        channels_last=channels_last,
    )


def seed_process(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators from ``step`` on, for dropout; every rank has its own stream."""
    state = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> np.uint64(1)))


def _prepare_model(module: nn.Module, config: RunConfig, world: World, peers: Peers) -> None:
    """Synchronise batch norms, move the model, recompute activations, compile; all in place."""
    train = config.train
    if train.sync_batch_norm:
        synchronise_batch_norm(module, peers)
    if train.precision in ("float64", "bf16-params") and not config.model.float64:
        name = type(config.model).__name__
        raise ConfigError("train.precision", train.precision, f"{name} of transformers computes parts in float32")
    dtype = torch.float64 if train.precision == "float64" else torch.float32
    floating = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    # Tensors without data, of which a plan makes its models, cannot be moved.
    if any((t.device, t.dtype) != (world.device, dtype) for t in floating):
        module.to(world.device, dtype)
    if train.activation_checkpointing:
        if not getattr(module, "supports_gradient_checkpointing", False):
            rule = f"{type(module).__name__} cannot recompute its activations"
            raise ConfigError("train.activation_checkpointing", True, rule, fix="Set it to false.")
        # The name until transformers 5.
        old = getattr(module, "gradient_checkpointing_enable", None)
        enable: Any = getattr(module, "activation_checkpointing_enable", old)
        enable({"use_reentrant": False})
    compile_model(module, config.compile)


def wants_channels_last(config: RunConfig, module: nn.Module, sample: Batch, device: torch.device) -> bool:
    """Whether images are to be stored with their channels last; ConfigError if there are none, or no convolutions."""
    wanted = config.train.channels_last
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in module.modules())
    if not convolutions or not any(map(is_image, sample.values())):
        if wanted == "on":
            rule = f"is for images and 2-d convolutions, of which {type(module).__name__} or the data have none"
            raise ConfigError("train.channels_last", wanted, rule, fix='Set it to "auto".')
        return False
    # The patches of a ViT are one convolution, whose result is flattened at once.
    return wanted == "on" or (wanted == "auto" and device.type == "cuda" and convolutions > 1)


def synchronise_batch_norm(module: nn.Module, world: Peers) -> None:
    """Convert batch norms to ``SyncBatchNorm``, in place; without GPUs, for which torch has no kernels, warn.

    Sends 2 C + 1 numbers a layer of C channels forward, 2 C backward.
    """
    if world.size > 1 and world.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(module, world.group)
    elif world.size > 1:
        log.warning(
            "train.sync_batch_norm is true, but torch can do that on GPUs only: each of the %d ranks takes "
            "batch statistics from its own part of the batch.",
            world.size,
        )


def _controller(
    config: RunConfig, engine: Engine, module: nn.Module, optimizer: Optimizer, total: int
) -> Dense | OIALR:
    frequency = config.record.frequency if config.record.spectra else None
    if config.oialr is None:
        return Dense(module, optimizer, engine, frequency=frequency)
    if config.oialr.delay >= total:
        log.warning(
            "oialr.delay is %d but the run has %d steps: nothing will be converted, training stays dense. "
            "Set oialr.delay below %d, or train longer.",
            *(config.oialr.delay, total, total),
        )
    method = replace(config.oialr, stability_frequency=config.oialr.stability_frequency or frequency)
    return OIALR(module, optimizer, method, engine=engine)


@contextmanager
def _section(name: str) -> Iterator[None]:
    """Prefix names in errors with the section."""
    try:
        yield
    except ConfigError as error:
        raise error.in_section(name) from None
