"""A run that goes through the phases of a plan in a few steps: the run's own code, events when asked for."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from hpc_oialr.data import Batch
from hpc_oialr.engines import SingleEngine
from hpc_oialr.errors import DataError
from hpc_oialr.method.oialr import OIALR
from hpc_oialr.method.report import UpdateReport
from hpc_oialr.method.rules import RankRule
from hpc_oialr.plan.trace_step import trained_parameters
from hpc_oialr.plan.workload import NEVER, Workload
from hpc_oialr.processes import World
from hpc_oialr.train.one_step import forward_backward
from hpc_oialr.train.session import Session

STAGES = ("dense", "converted", "end")
_MAX_UPDATES = 200


class ScriptedRun:
    """Steps and events of a session of :meth:`Workload.session`, each when it is called.

    Attributes
    ----------
    event_s
        Wall time of the last event.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.steps = 0
        self.event_s = 0.0
        session.module.train()

    def samples(self, batch: int) -> Batch:
        """So many samples of the training data, for this process."""
        return self.session.splits.train.gather(torch.arange(batch))

    def step(self, batch: int) -> float:
        """One step with ``batch`` samples; its wall time, data included, without the method's part."""
        start = time.perf_counter()
        self.train(self.samples(batch))
        if self.session.world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        self.session.controller.step()
        return seconds

    def train(self, samples: Batch) -> None:
        """Forward and backward pass, and the optimizer's step."""
        session = self.session
        forward_backward(session, session.place(samples), self.steps)
        trained = trained_parameters(session)
        session.engine.update(session.optimizer, session.scaler, trained, session.config.train.gradient_clip)
        self.steps += 1

    def convert(self, samples: Batch) -> UpdateReport:
        """A step with the conversion after it."""
        method = self._method()
        method.config.delay = method.t + 1
        return self._event(samples)

    def update(self, samples: Batch) -> UpdateReport:
        """A step with an update after it."""
        config = self._method().config
        config.frequency = 1
        report = self._event(samples)
        config.frequency = NEVER
        return report

    def settle(self, samples: Batch) -> None:
        """Updates until r stays."""
        method = self._method()
        for _ in range(_MAX_UPDATES):
            before = method.r
            self.update(samples)
            if method.r == before and method.updates * method.config.layer_share_step >= 1:
                return

    def _event(self, samples: Batch) -> UpdateReport:
        self.train(samples)
        start = time.perf_counter()
        report = self.session.controller.step()
        self.event_s = time.perf_counter() - start
        assert report is not None
        return report

    def _method(self) -> OIALR:
        controller = self.session.controller
        assert isinstance(controller, OIALR)
        return controller


@dataclass
class Probe:
    """Measured times: of a step by stage, batch and threads, and of the conversion (s)."""

    steps: dict[tuple[str, int, int], float] = field(default_factory=dict)
    conversion_s: float | None = None

    def seconds(self, stage: str, batch: int, threads: int) -> float:
        """Of a step; linear between measured batches, beyond the last two on their line, and in proportion to one.

        A number of threads that was not measured counts as the nearest one that was.
        """
        threads = min({t for name, _, t in self.steps if name == stage}, key=lambda t: abs(t - threads))
        points = sorted((b, s) for (name, b, t), s in self.steps.items() if (name, t) == (stage, threads))
        if len(points) == 1:
            return points[0][1] * batch / points[0][0]
        pairs = list(itertools.pairwise(points))
        low, high = next((pair for pair in pairs if batch <= pair[1][0]), pairs[-1])
        return max(0.0, low[1] + (high[1] - low[1]) * (batch - low[0]) / (high[0] - low[0]))


def probe(
    workload: Workload, rule: RankRule | None, loads: Iterable[tuple[int, int]], *, steps: int = 3
) -> Probe:
    """Measure on one process: dense steps, the conversion, steps, updates until r stays, steps.

    Parameters
    ----------
    rule
        Chooses r, instead of the recipe's.
    loads
        Batch and threads of the steps to be timed, each ``steps`` times after one that does not count.

    Raises
    ------
    DataError
        If the data are not on this machine.
    """
    if workload.assumption is not None:
        raise DataError(
            f"--probe trains for some steps, but {workload.assumption}. Fetch the data, or leave out --probe."
        )
    found, loads, threads_before = Probe(), sorted(set(loads)), torch.get_num_threads()
    session = workload.session(
        SingleEngine(World()), batch=max(batch for batch, _ in loads), rule=rule, fake_data=False
    )
    run = ScriptedRun(session)
    small = run.samples(min(batch for batch, _ in loads))
    for stage in STAGES if workload.config.oialr is not None else STAGES[:1]:
        torch.set_num_threads(threads_before)
        if stage == "converted":
            run.convert(small)
            found.conversion_s = run.event_s
        elif stage == "end":
            run.settle(small)
        for batch, threads in loads:
            torch.set_num_threads(threads)
            times = [run.step(batch) for _ in range(steps + 1)]
            found.steps[stage, batch, threads] = statistics.median(times[1:])
    torch.set_num_threads(threads_before)
    return found
