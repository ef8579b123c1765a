"""The real code as one process of a large world that is not there."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hpc_oialr.engines import DeepSpeed, EngineConfig
from hpc_oialr.errors import ConfigError
from hpc_oialr.lowrank.layout import local
from hpc_oialr.method.report import UpdateReport
from hpc_oialr.method.rules import RankRule
from hpc_oialr.plan.imagined import imagined_world
from hpc_oialr.plan.lonely_linalg import lonely_linalg
from hpc_oialr.plan.subject import Subject
from hpc_oialr.plan.walk import Walk, walking_session
from hpc_oialr.processes import World, open_channel
from hpc_oialr.record.memory import resident_bytes
from hpc_oialr.train.exchange import UpdateExchange


@dataclass(frozen=True)
class DryRun:
    """What one process did.

    Attributes
    ----------
    rank, size
        Which one, of how many.
    seconds
        Wall time of it all.
    svds
        How many SVDs of weights were dealt to it at the conversion.
    resident_bytes
        What it holds between steps at the end.
    r
        Smallest and largest r at the end.
    channel
        What carried the metrics.
    """

    rank: int
    size: int
    seconds: float
    svds: int
    resident_bytes: int
    r: tuple[int, int]
    channel: str


def dry_run(
    subject: Subject,
    size: int,
    *,
    engine: EngineConfig | None = None,
    rule: RankRule | None = None,
    ranks: Sequence[int] | None = None,
) -> Iterator[DryRun]:
    """Session, step, conversion, step, update, step: as some processes of ``size``, one after another.

    On the CPU with one sample a process and made-up data, over torch's fake process group: whatever another
    process would have sent is zero. Where matrices are split, TSQR, whose messages carry sizes, is left out: its
    results are made up in the right shapes.

    Parameters
    ----------
    engine, rule
        In place of the recipe's.
    ranks
        Which; default the first, the middle and the last one.

    Raises
    ------
    ConfigError
        Under DeepSpeed, whose communication torch's fake group cannot stand in for.
    """
    engine = engine or subject.config.engine
    if isinstance(engine, DeepSpeed):
        rule_ = "cannot be run without its processes; torch's fake process group is not DeepSpeed's"
        raise ConfigError("engine", "DeepSpeed", rule_, fix="Take DDP, FSDP or TensorParallel.")
    for rank in ranks or sorted({0, size // 2, size - 1}):
        with imagined_world(rank, size) as world, lonely_linalg(), warnings.catch_warnings():
            # Of DDP, where a process has one sample only.
            warnings.filterwarnings("ignore", message="Grad strides do not match")
            yield _run(subject, world, engine, rule)


def _run(subject: Subject, world: World, engine: EngineConfig, rule: RankRule | None) -> DryRun:
    start = time.perf_counter()
    batch = subject.config.train.accumulation
    made = engine.build(world, subject.config.train.precision)
    session = walking_session(subject, made, batch=batch, rule=rule, blank=True)
    if isinstance(session.controller.model, DistributedDataParallel):
        # Its own all-reduce wants an answer.
        session.controller.model.register_comm_hook(None, _reduced_alone)
    # What shards that are all alike give may be anything.
    session.optimizer.register_step_pre_hook(_without_gradients)
    walk, channel = Walk(session), open_channel(world)
    exchange = UpdateExchange(channel, world)
    samples = walk.samples(batch)
    report = walk.convert(samples)
    _tell(exchange, report)
    _tell(exchange, walk.update(samples))
    walk.step(batch)
    values = list(session.controller.r.values())
    return DryRun(
        world.rank,
        world.size,
        time.perf_counter() - start,
        sum(layer.seconds > 0 for layer in report.layers),
        resident_bytes(session.module, session.optimizer),
        (min(values), max(values)),
        channel.name,
    )


def _reduced_alone(_: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    dist.all_reduce(bucket.buffer())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


# DDP looks at the types themselves, not at their names.
_reduced_alone.__annotations__ |= {"bucket": GradBucket, "return": torch.futures.Future[Tensor]}


def _without_gradients(optimizer: Optimizer, *_: object) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                local(parameter.grad).zero_()


def _tell(exchange: UpdateExchange, report: UpdateReport) -> None:
    exchange.start(report)
    exchange.collect()
