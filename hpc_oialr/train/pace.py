"""Which rank the others wait for: each rank's own time in a step, before any rank can wait for another one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hpc_oialr.distributed.environment import node_name
from hpc_oialr.distributed.world import World
from hpc_oialr.engines.ddp import DDPEngine
from hpc_oialr.method.engine import Engine


@dataclass(frozen=True)
class Pace:
    """The slowest rank over some steps."""

    rank: int
    ratio: float  # its own time over that of the median rank
    late_s: float  # their difference, a step (s)

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Pace:
        """From every rank's own time a step (s).

        >>> Pace.of([0.25, 1.0, 0.5])
        Pace(rank=1, ratio=2.0, late_s=0.5)
        """
        rank, median = max(range(len(seconds)), key=seconds.__getitem__), statistics.median(seconds)
        return cls(rank, seconds[rank] / median if median > 0 else 1.0, seconds[rank] - median)


class OwnTime:
    """This rank's waiting for data, and its forward passes up to the last backward pass of each step.

    Under DDP: there the first thing that all ranks wait for is the reduction of gradients, in that backward pass. Other
    engines gather parameters in the forward pass, so that all ranks are as late as the slowest: they are not measured.
    On a GPU by events, which cost no synchronisation.
    """

    def __init__(self, world: World, engine: Engine) -> None:
        self.on = world.size > 1 and isinstance(engine, DDPEngine)
        self.nodes: list[str] = world.all_gather_object(node_name()) if self.on else []
        self._gpu = world.device.type == "cuda"
        self._begun: Any = None
        self._spans: list[tuple[Any, Any]] = []
        self._seconds, self._steps = 0.0, 0

    def begin(self, waited_s: float) -> None:
        """A step begins, after ``waited_s`` seconds of waiting for its batch."""
        if self.on:
            self._seconds, self._steps, self._begun = self._seconds + waited_s, self._steps + 1, self._now()

    def computed(self) -> None:
        """The last forward pass of the step is done."""
        if self.on:
            self._spans.append((self._begun, self._now()))

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def since_last(self) -> float:
        """Mean over the steps since the last call (s); waits for the GPU."""
        for begun, done in self._spans:
            if self._gpu:
                done.synchronize()
            self._seconds += begun.elapsed_time(done) / 1000 if self._gpu else done - begun
        mean = self._seconds / max(1, self._steps)
        self._spans, self._seconds, self._steps = [], 0.0, 0
        return mean

    def row(self, seconds: Sequence[float]) -> dict[str, Any]:
        """What ``metrics.jsonl`` holds, from every rank's :meth:`since_last`; nothing where it is not measured."""
        if not self.on:
            return {}
        pace = Pace.of(seconds)
        return {
            "slowest_rank": pace.rank,
            "slowest_node": self.nodes[pace.rank],
            "slowest_ratio": pace.ratio,
            "slowest_late_s": pace.late_s,
        }
