"""A run that goes through the phases of a plan in a few steps: the run's own code, events when asked for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from hpc_oialr.data import Batch
from hpc_oialr.distributed import World
from hpc_oialr.engines import SingleEngine
from hpc_oialr.errors import DataError
from hpc_oialr.method.oialr import OIALR
from hpc_oialr.method.report import UpdateReport
from hpc_oialr.method.rules import RankRule
from hpc_oialr.plan.trace_step import trained_parameters
from hpc_oialr.plan.workload import NEVER, Workload
from hpc_oialr.train.one_step import forward_backward
from hpc_oialr.train.run_context import RunContext

STAGES = ("dense", "converted", "end")
_MAX_UPDATES = 200


class ScriptedRun:
    """Steps and events of a run of :meth:`Workload.run_context`, each when it is called.

    Attributes
    ----------
    event_s
        Wall time of the last event.
    """

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.steps = 0
        self.event_s = 0.0
        context.module.train()

    @property
    def method(self) -> OIALR:
        """The controller."""
        controller = self.context.controller
        assert isinstance(controller, OIALR)
        return controller

    def samples(self, batch: int) -> Batch:
        """So many samples of the training data, for this process."""
        return self.context.splits.train.gather(torch.arange(batch))

    def step(self, batch: int) -> float:
        """One step with ``batch`` samples; its wall time, data included, without the method's part."""
        start = time.perf_counter()
        self.train(self.samples(batch))
        seconds = time.perf_counter() - start
        self.context.controller.step()
        return seconds

    def train(self, samples: Batch) -> None:
        """Forward and backward pass, and the optimizer's step."""
        context = self.context
        forward_backward(context, context.place(samples), self.steps)
        trained = trained_parameters(context)
        context.engine.update(context.optimizer, context.scaler, trained, context.config.train.gradient_clip)
        self.steps += 1

    def convert(self) -> UpdateReport:
        """The conversion, after a step."""
        self.method.config.delay = self.method.t + 1
        return self._event()

    def update(self) -> UpdateReport:
        """An update, after a step."""
        self.method.config.frequency = 1
        report = self._event()
        self.method.config.frequency = NEVER
        return report

    def settle(self, samples: Batch) -> None:
        """Steps with an update after each, until r stays."""
        method = self.method
        for _ in range(_MAX_UPDATES):
            before = method.r
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


@dataclass
class Measured:
    """Times on one process: of a step, by stage and batch, and of the conversion (s)."""

    steps: dict[tuple[str, int], float] = field(default_factory=dict)
    conversion_s: float | None = None


def probe(
    workload: Workload, rule: RankRule | None, batches: Iterable[int], threads: int, *, steps: int = 3
) -> Measured:
    """Measure dense steps, the conversion, steps, updates until r stays, steps; on one process.

    Parameters
    ----------
    rule
        Chooses r, instead of the recipe's.
    batches
        Of the steps to be timed, each ``steps`` times after one that does not count.
    threads
        Of the steps; the conversion takes all of this process.

    Raises
    ------
    DataError
        If the data are not on this machine.
    """
    if workload.assumption is not None:
        raise DataError(
            f"--probe trains for some steps, but {workload.assumption}. Fetch the data, or leave out --probe."
        )
    found, batches, threads_before = Measured(), sorted(set(batches)), torch.get_num_threads()
    context = workload.run_context(SingleEngine(World()), batch=batches[-1], rule=rule, fake_data=False)
    run = ScriptedRun(context)
    small = run.samples(batches[0])
    for stage in STAGES if workload.config.oialr is not None else STAGES[:1]:
        torch.set_num_threads(threads_before)
        if stage == "converted":
            run.train(small)
            run.convert()
            found.conversion_s = run.event_s
        elif stage == "end":
            run.settle(small)
        torch.set_num_threads(threads)
        for batch in batches:
            times = [run.step(batch) for _ in range(steps + 1)]
            found.steps[stage, batch] = statistics.median(times[1:])
    torch.set_num_threads(threads_before)
    return found
