"""A run's own code on real tensors, for a few steps, with the method's events on request.

Measures steps on one process (:func:`probe`), or runs as single ranks of a large world (:func:`dry_run`).
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hpc_oialr.data import Batch
from hpc_oialr.distributed import MetricsChannel, World, open_channel
from hpc_oialr.engines import DeepSpeed, EngineConfig, SingleEngine
from hpc_oialr.errors import ConfigError, DataError
from hpc_oialr.lowrank.layout import local
from hpc_oialr.method.oialr import OIALR
from hpc_oialr.method.report import UpdateReport
from hpc_oialr.method.rules import RankRule
from hpc_oialr.plan.fake_world import fake_collectives, fake_world
from hpc_oialr.plan.workload import NEVER, Workload
from hpc_oialr.record.memory import resident_bytes
from hpc_oialr.record.update_metrics import pack
from hpc_oialr.train.run_context import RunContext
from hpc_oialr.train.trainer import forward_backward

STAGES = ("dense", "converted", "end")
_MAX_UPDATES = 200


class ScriptedRun:
    """Steps and events of a run of :meth:`Workload.run_context`, each on request."""

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.steps = 0
        self.event_s = 0.0  # wall time of the last event
        context.module.train()

    @property
    def method(self) -> OIALR:
        """The controller."""
        controller = self.context.controller
        assert isinstance(controller, OIALR)
        return controller

    def samples(self, batch: int) -> Batch:
        """Training samples of this process."""
        return self.context.splits.train.gather(torch.arange(batch))

    def step(self, batch: int) -> float:
        """One step with ``batch`` samples; its wall time (s), data included, the method excluded."""
        start = time.perf_counter()
        self.train(self.samples(batch))
        seconds = time.perf_counter() - start
        self.context.controller.step()
        return seconds

    def train(self, samples: Batch) -> None:
        """Forward and backward pass, and the optimizer's step."""
        context = self.context
        forward_backward(context, samples, self.steps)
        trained, clip = trained_parameters(context), context.config.train.gradient_clip
        context.engine.update(context.optimizer, context.scaler, trained, clip)
        self.steps += 1

    def expect(self, event: Literal["conversion", "update"]) -> None:
        """Before a step that :meth:`convert` or :meth:`update` follows: gather second moments in it."""
        method, config = self.method, self.method.config
        if event == "conversion":
            config.delay = method.t + 1
        else:
            config.delay = min(config.delay, method.t)
            config.frequency = method.t + 1 - config.delay
        method.watch()

    def convert(self) -> UpdateReport:
        """The conversion, after a step."""
        if not self.method.gathered:
            self.expect("conversion")
        return self._event()

    def update(self) -> UpdateReport:
        """An update, after a step."""
        if not self.method.gathered:
            self.expect("update")
        report = self._event()
        self.method.config.frequency = NEVER
        return report

    def settle(self, samples: Batch) -> None:
        """Steps with an update after each, until r no longer changes."""
        method = self.method
        for _ in range(_MAX_UPDATES):
            before = method.r
            self.expect("update")
            self.train(samples)
            self.update()
            if method.r == before and method.updates * method.config.layer_share_step >= 1:
                return

    def _event(self) -> UpdateReport:
        start = time.perf_counter()
        report = self.method.step()
        self.event_s = time.perf_counter() - start
        assert report is not None
        return report


def trained_parameters(context: RunContext) -> list[torch.nn.Parameter]:
    """Parameters with gradients."""
    return [p for p in context.module.parameters() if p.requires_grad]


@dataclass
class Measured:
    """Times on one process: of a step, by stage and batch, and of the conversion (s)."""

    steps: dict[tuple[str, int], float] = field(default_factory=dict)
    conversion_s: float | None = None


def probe(workload: Workload, rule: RankRule | None, batches: Iterable[int], threads: int) -> Measured:
    """Measure steps before the conversion, the conversion, steps after it and at the final r; on one process.

    Each batch is timed three times after a warm-up step, with ``threads``; the conversion takes all threads of this
    process. Raises DataError if the data are not on this machine.
    """
    if workload.assumption is not None:
        raise DataError(
            f"--probe trains for some steps, but {workload.assumption}. Fetch the data, or leave out --probe."
        )
    found, batches, threads_before = Measured(), sorted(set(batches)), torch.get_num_threads()
    trained = workload.config.oialr is not None and workload.config.oialr.train == "factors"
    context = workload.run_context(
        SingleEngine(World()), batch=batches[-1], rule=rule, trained=trained, fake_data=False
    )
    run = ScriptedRun(context)
    small = run.samples(batches[0])
    for stage in STAGES if workload.config.oialr is not None else STAGES[:1]:
        torch.set_num_threads(threads_before)
        if stage == "converted":
            run.expect("conversion")
            run.train(small)
            run.convert()
            found.conversion_s = run.event_s
        elif stage == "end":
            run.settle(small)
        torch.set_num_threads(threads)
        for batch in batches:
            times = [run.step(batch) for _ in range(4)]
            found.steps[stage, batch] = statistics.median(times[1:])
    torch.set_num_threads(threads_before)
    return found


@dataclass(frozen=True)
class DryRun:
    """What one rank did."""

    rank: int
    size: int
    seconds: float  # wall time of it all
    svds: int  # of weights, at the conversion
    resident_bytes: int  # between steps at the end
    r: tuple[int, int]  # smallest and largest at the end
    channel: str  # over which metrics were sent


def dry_run(
    workload: Workload,
    size: int,
    *,
    engine: EngineConfig | None = None,
    rule: RankRule | None = None,
    ranks: Sequence[int] | None = None,
) -> Iterator[DryRun]:
    """A step, a conversion, a step, an update, a step: as some ranks of ``size``, one after another.

    On the CPU with one sample per rank and made-up data, over torch's fake process group: what another rank would
    have sent is zero, and results of TSQR are made up in the right shapes. Default: the recipe's engine and rule; the
    first, the middle and the last rank. Raises ConfigError under DeepSpeed, whose communication torch's fake group
    does not support.
    """
    engine = engine or workload.config.engine
    if isinstance(engine, DeepSpeed):
        reason = "cannot be run without its processes; torch's fake process group is not DeepSpeed's"
        raise ConfigError("engine", "DeepSpeed", reason, fix="Take DDP, FSDP or TensorParallel.")
    for rank in ranks or sorted({0, size // 2, size - 1}):
        with fake_world(rank, size) as world, fake_collectives(), warnings.catch_warnings():
            # DDP's, where a rank has one sample only.
            warnings.filterwarnings("ignore", message="Grad strides do not match")
            # In a function of its own, so that nothing of one rank is alive during the next.
            yield _run_as(workload, world, engine, rule)


def _run_as(workload: Workload, world: World, engine: EngineConfig, rule: RankRule | None) -> DryRun:
    start = time.perf_counter()
    batch = workload.config.train.accumulation
    built = engine.build(world, workload.config.train.precision)
    method = workload.config.oialr
    trained = method is not None and method.frees_bases
    context = workload.run_context(built, batch=batch, rule=rule, trained=trained)
    if isinstance(context.controller.model, DistributedDataParallel):
        # DDP's own all-reduce would wait for the other ranks.
        context.controller.model.register_comm_hook(None, _all_reduce_alone)
    # Equal shards on all ranks may give any gradient, NaN included.
    context.optimizer.register_step_pre_hook(_zero_gradients)
    run, channel = ScriptedRun(context), open_channel(world)
    samples = run.samples(batch)
    run.expect("conversion")
    run.train(samples)
    conversion = run.convert()
    _exchange(channel, world, conversion)
    run.expect("update")
    run.train(samples)
    _exchange(channel, world, run.update())
    run.step(batch)
    seconds, r = time.perf_counter() - start, context.controller.r.values()
    svds = sum(layer.seconds > 0 for layer in conversion.layers)
    held = resident_bytes(context.module, context.optimizer)
    return DryRun(world.rank, world.size, seconds, svds, held, (min(r), max(r)), channel.name)


def _exchange(channel: MetricsChannel, world: World, report: UpdateReport) -> None:
    for event in report.all:
        channel.start(pack(event, world.rank, world.size)).result()


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
