"""The run's own code, on real tensors, as single processes of a large world."""

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

from hpc_oialr.distributed import World, open_channel
from hpc_oialr.engines import DeepSpeed, EngineConfig
from hpc_oialr.errors import ConfigError
from hpc_oialr.lowrank.layout import local
from hpc_oialr.method.report import UpdateReport
from hpc_oialr.method.rules import RankRule
from hpc_oialr.plan.fake_world import fake_collectives, fake_world
from hpc_oialr.plan.scripted_run import ScriptedRun
from hpc_oialr.plan.workload import Workload
from hpc_oialr.record.memory import resident_bytes
from hpc_oialr.train.exchange import UpdateExchange


@dataclass(frozen=True)
class DryRun:
    """What one process did.

    Attributes
    ----------
    seconds
        Wall time of it all.
    svds
        SVDs of weights that it did at the conversion.
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
    workload: Workload,
    size: int,
    *,
    engine: EngineConfig | None = None,
    rule: RankRule | None = None,
    ranks: Sequence[int] | None = None,
) -> Iterator[DryRun]:
    """A step, a conversion, a step, an update, a step: as some processes of ``size``, one after another.

    On the CPU with one sample per process and made-up data, over torch's fake process group: whatever another
    process would have sent is zero, and results of TSQR are made up in the right shapes.

    Parameters
    ----------
    engine, rule
        Instead of the recipe's.
    ranks
        Which processes; default the first, the middle and the last one.

    Raises
    ------
    ConfigError
        Under DeepSpeed, whose communication torch's fake group cannot stand in for.
    """
    engine = engine or workload.config.engine
    if isinstance(engine, DeepSpeed):
        reason = "cannot be run without its processes; torch's fake process group is not DeepSpeed's"
        raise ConfigError("engine", "DeepSpeed", reason, fix="Take DDP, FSDP or TensorParallel.")
    for rank in ranks or sorted({0, size // 2, size - 1}):
        with fake_world(rank, size) as world, fake_collectives(), warnings.catch_warnings():
            # DDP's, where a process has one sample only.
            warnings.filterwarnings("ignore", message="Grad strides do not match")
            yield _run(workload, world, engine, rule)


def _run(workload: Workload, world: World, engine: EngineConfig, rule: RankRule | None) -> DryRun:
    start = time.perf_counter()
    batch = workload.config.train.accumulation
    built = engine.build(world, workload.config.train.precision)
    context = workload.run_context(built, batch=batch, rule=rule)
    if isinstance(context.controller.model, DistributedDataParallel):
        # DDP's own all-reduce waits for an answer.
        context.controller.model.register_comm_hook(None, _all_reduce_alone)
    # What shards that are all alike give may be anything, NaN included.
    context.optimizer.register_step_pre_hook(_zero_gradients)
    run, channel = ScriptedRun(context), open_channel(world)
    exchange = UpdateExchange(channel, world)
    samples = run.samples(batch)
    run.train(samples)
    conversion = run.convert()
    _send(exchange, conversion)
    run.train(samples)
    _send(exchange, run.update())
    run.step(batch)
    r = context.controller.r.values()
    return DryRun(
        world.rank,
        world.size,
        time.perf_counter() - start,
        sum(layer.seconds > 0 for layer in conversion.layers),
        resident_bytes(context.module, context.optimizer),
        (min(r), max(r)),
        channel.name,
    )


def _send(exchange: UpdateExchange, report: UpdateReport) -> None:
    exchange.start(report)
    exchange.collect()


def _all_reduce_alone(_: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    dist.all_reduce(bucket.buffer())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


# DDP checks the types themselves, not their names.
_all_reduce_alone.__annotations__ |= {"bucket": GradBucket, "return": torch.futures.Future[Tensor]}


def _zero_gradients(optimizer: Optimizer, *_: object) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                local(parameter.grad).zero_()
