"""A short real run of a recipe on one process: how long its steps and events take here."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from hpc_oialr.engines import SingleEngine
from hpc_oialr.errors import DataError
from hpc_oialr.method.rules import RankRule
from hpc_oialr.plan.subject import Subject
from hpc_oialr.plan.walk import Walk, walking_session
from hpc_oialr.processes import World

STAGES = ("dense", "converted", "end")


@dataclass
class Probe:
    """Measured times.

    Attributes
    ----------
    steps
        Seconds of a step by stage, batch and threads.
    events
        Seconds of the conversion and of the first update.
    """

    steps: dict[tuple[str, int, int], float] = field(default_factory=dict)
    events: dict[str, float] = field(default_factory=dict)

    def seconds(self, stage: str, batch: int, threads: int) -> float:
        """Of a step; between measured batches on a straight line, beyond the last one in proportion.

        A number of threads that was not measured counts as the nearest one that was.
        """
        known = {t for name, _, t in self.steps if name == stage}
        threads = min(known, key=lambda t: abs(t - threads))
        points = sorted((b, s) for (name, b, t), s in self.steps.items() if (name, t) == (stage, threads))
        if len(points) == 1:
            return points[0][1] * batch / points[0][0]
        pairs = list(itertools.pairwise(points))
        low, high = next((pair for pair in pairs if batch <= pair[1][0]), pairs[-1])
        return max(0.0, low[1] + (high[1] - low[1]) * (batch - low[0]) / (high[0] - low[0]))


def probe(
    subject: Subject, rule: RankRule | None, loads: Iterable[tuple[int, int]], *, steps: int = 3
) -> Probe:
    """Dense steps, the conversion, steps, updates until r stays, steps.

    Parameters
    ----------
    rule
        Chooses r, in place of the recipe's.
    loads
        Batch and threads of the steps to be timed, each ``steps`` times after one that does not count.

    Raises
    ------
    DataError
        If the data are not here.
    """
    if subject.assumption is not None:
        raise DataError(
            f"--probe trains for some steps, but {subject.assumption}. Fetch the data, or leave out --probe."
        )
    found, loads = Probe(), sorted(set(loads))
    largest = max(batch for batch, _ in loads)
    walk = Walk(walking_session(subject, SingleEngine(World()), batch=largest, rule=rule))
    before = torch.get_num_threads()
    for stage in STAGES if subject.config.oialr is not None else STAGES[:1]:
        torch.set_num_threads(before)
        _go_to(stage, walk, min(batch for batch, _ in loads), found)
        for batch, threads in loads:
            torch.set_num_threads(threads)
            times = [walk.step(batch) for _ in range(steps + 1)]
            found.steps[stage, batch, threads] = statistics.median(times[1:])
    torch.set_num_threads(before)
    return found


def _go_to(stage: str, walk: Walk, batch: int, found: Probe) -> None:
    samples = walk.samples(batch)
    if stage == "converted":
        walk.convert(samples)
        found.events["conversion"] = walk.event_s
    elif stage == "end":
        walk.update(samples)
        found.events["update"] = walk.event_s
        walk.settle(samples)
