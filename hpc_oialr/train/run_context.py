"""Everything one run works with, made in the order that makes it reproducible."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hpc_oialr.data import Batch, GlobalBatches, Splits
from hpc_oialr.distributed import World
from hpc_oialr.errors import ConfigError
from hpc_oialr.method.engine import Engine, Peers
from hpc_oialr.method.oialr import OIALR
from hpc_oialr.train.batch_norm import synchronise_batch_norm
from hpc_oialr.train.config import RunConfig
from hpc_oialr.train.config_tree import in_section
from hpc_oialr.train.controllers import Controller, Dense
from hpc_oialr.train.fingerprint import fingerprint
from hpc_oialr.train.schedules import LearningRates
from hpc_oialr.train.seeds import seed_model, seed_process

log = logging.getLogger(__name__)

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class RunContext:
    """The parts of a run.

    Attributes
    ----------
    batches
        Training batches; ``batches.epoch(e, start)`` gives this process's part.
    controller
        The method, or its dense stand-in; holds the model.
    scaler
        Loss scale for fp16; disabled otherwise.
    total_steps
        Length of the run.
    identity
        The dense model's fingerprint.
    example
        Shape and dtype of every tensor of a small batch: what the model was made for.
    units_per_step
        Images, tokens or windows of a global batch.
    """

    config: RunConfig
    world: World
    splits: Splits
    batches: GlobalBatches
    controller: Controller
    optimizer: Optimizer
    rates: LearningRates
    scaler: torch.amp.GradScaler
    total_steps: int
    identity: dict[str, Any]
    example: dict[str, Any]
    units_per_step: int

    @property
    def engine(self) -> Engine:
        """How the processes share the work."""
        return self.controller.engine

    @property
    def module(self) -> nn.Module:
        """The model without wrappers."""
        return self.controller.module

    def autocast(self) -> torch.autocast:
        """The run's precision for a forward pass."""
        return autocast(self.config.train.precision, self.world.device)

    def place(self, batch: Batch) -> Batch:
        """A batch on the device, in float64 where the run is."""
        moved = {key: value.to(self.world.device, non_blocking=True) for key, value in batch.items()}
        if self.config.train.precision != "float64":
            return moved
        return {key: value.double() if value.is_floating_point() else value for key, value in moved.items()}


def make_run_context(config: RunConfig, world: World) -> RunContext:
    """Load the data, then make model, optimizer and method from the run's seed.

    Raises
    ------
    ConfigError, DataError, ModelError
        If settings, data, world and model do not fit each other.
    """
    train = config.train
    with _section("data"):
        splits = config.data.build()
        if splits.validation is None and splits.test is None:
            raise ConfigError(
                "class_path", type(config.data).__name__, "leaves neither validation nor test data"
            )
    with _section("engine"):
        engine = config.engine.build(world, train.precision)
        engine.expect(
            global_batch=train.global_batch, accumulation=train.accumulation, clip=train.gradient_clip
        )
    batches = _batches(config, engine.data, splits)
    total = train.total_steps(len(batches))
    seed_model(train.seed)
    sample = splits.train.gather(torch.arange(min(2, len(splits.train))))
    config.task.check(sample, splits.classes, config.model)
    with _section("model"):
        module = config.model.build(sample)
    if train.sync_batch_norm:
        synchronise_batch_norm(module, engine.data)
    identity = _place_model(module, config, world)
    engine.pairs = config.model.pairs
    engine.place(module)
    optimizer = config.optimizer.build(module)
    rates = config.schedule.build(optimizer, total, len(batches))
    controller = _controller(config, engine, module, optimizer, total)
    seed_process(train.seed, 0, engine.data.rank)
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
    )


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Autocast to bf16 or fp16; a context without effect for the others."""
    return torch.autocast(device.type, dtype=AUTOCAST.get(precision), enabled=precision in AUTOCAST)


def _batches(config: RunConfig, world: Peers, splits: Splits) -> GlobalBatches:
    train = config.train
    with _section("train"):
        train.check_accumulation(world.size)
        return GlobalBatches(
            splits.train,
            train.global_batch,
            world_rank=world.rank,
            world_size=world.size,
            seed=train.seed,
            shuffle=True,
            drop_last=True,
            num_workers=train.workers,
            pin_memory=world.device.type == "cuda",
        )


def _place_model(module: nn.Module, config: RunConfig, world: World) -> dict[str, Any]:
    """Move and prepare the model in place; its fingerprint."""
    train = config.train
    if train.precision == "float64" and not config.model.float64:
        name = type(config.model).__name__
        raise ConfigError("train.precision", "float64", f"{name} of transformers computes parts in float32")
    _move(module, world.device, torch.float64 if train.precision == "float64" else torch.float32)
    if train.activation_checkpointing:
        _checkpoint_activations(module)
    if config.compile:
        module.compile()
    return fingerprint(module)


def _move(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Unless all is there: tensors without data, of which a plan makes its models, cannot be moved."""
    floating = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    if any((t.device, t.dtype) != (device, dtype) for t in floating):
        module.to(device, dtype)


def _checkpoint_activations(module: nn.Module) -> None:
    if not getattr(module, "supports_gradient_checkpointing", False):
        rule = f"{type(module).__name__} cannot recompute its activations"
        raise ConfigError("train.activation_checkpointing", True, rule, fix="Set it to false.")
    # The name until transformers 5.
    old = getattr(module, "gradient_checkpointing_enable", None)
    enable: Any = getattr(module, "activation_checkpointing_enable", old)
    enable({"use_reentrant": False})


def _controller(
    config: RunConfig, engine: Engine, module: nn.Module, optimizer: Optimizer, total: int
) -> Controller:
    frequency = config.record.frequency if config.record.spectra else None
    if config.oialr is None:
        return Dense(module, optimizer, engine, frequency=frequency)
    if config.oialr.delay >= total:
        log.warning(
            "oialr.delay is %d but the run has %d steps: nothing will be converted, training stays dense. "
            "Set oialr.delay below %d, or train longer.",
            config.oialr.delay,
            total,
            total,
        )
    method = replace(config.oialr, stability_frequency=config.oialr.stability_frequency or frequency)
    return OIALR(module, optimizer, method, engine=engine)


@contextmanager
def _section(name: str) -> Iterator[None]:
    """Give errors of a section its name."""
    try:
        yield
    except ConfigError as error:
        raise in_section(error, name) from None
