"""Steps on many numbers of processes from a few traced ones.

Every quantity of a step is a constant, plus a part per sample of the process, plus a part sharded over processes.
With a fixed batch, per process or global, it is linear in the samples and in one over the number of processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np

from hpc_oialr.engines import DDP, DeepSpeed, EngineConfig
from hpc_oialr.plan.deployment import Deployment
from hpc_oialr.plan.trace_step import Resident, Step, trace_step
from hpc_oialr.plan.tracer import Trace
from hpc_oialr.plan.workload import Workload


class StepTraces:
    """Traced steps of a workload, each made once."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self._cache: dict[tuple[str, int, int, tuple[int, ...]], Step] = {}

    def steps(
        self, engine: EngineConfig, deployments: Sequence[Deployment], r: Mapping[str, int]
    ) -> dict[Deployment, Step]:
        """A step of every deployment; the smallest and the largest are traced, those between interpolated.

        Where the operations of two differ, because layers take another path with fewer tokens or groups have one
        member only, the one in the middle is traced too.
        """
        many = sorted({d for d in deployments if d.processes > 1}, key=lambda d: (1.0 / d.processes, d.batch))
        ends = {*many[:1], *many[-1:], *(d for d in deployments if d.processes == 1)}
        found = {d: self._traced(engine, d, r) for d in ends}
        pending = [many]
        while pending:
            row = pending.pop()
            if len(row) < 3:
                continue
            low, high = row[0], row[-1]
            if _operations(found[low]) == _operations(found[high]):
                for d in row[1:-1]:
                    found[d] = _between(found[low], found[high], _weight(engine, low, d, high), d)
                continue
            at = len(row) // 2
            found[row[at]] = self._traced(engine, row[at], r)
            pending += [row[: at + 1], row[at:]]
        return found

    def _traced(self, engine: EngineConfig, d: Deployment, r: Mapping[str, int]) -> Step:
        bare = d.processes == 1 or isinstance(engine, (DDP, DeepSpeed))
        key = ("" if bare else repr(engine), 1 if bare else d.processes, d.batch, tuple(r.values()))
        if key not in self._cache:
            self._cache[key] = trace_step(self.workload, engine, processes=d.processes, batch=d.batch, r=r)
        return self._cache[key]


def _operations(step: Step) -> list[object]:
    traces = step.passes, step.update
    return [(len(t.live), [(m.collective, m.stride > 1) for m in t.messages]) for t in traces]


def _weight(engine: EngineConfig, low: Deployment, d: Deployment, high: Deployment) -> float:
    """Where ``d`` lies between two others: 0 at ``low``, 1 at ``high``."""
    if isinstance(engine, (DDP, DeepSpeed)) and low.batch != high.batch:
        return (d.batch - low.batch) / (high.batch - low.batch)
    return (1 / d.processes - 1 / low.processes) / (1 / high.processes - 1 / low.processes)


def _between(a: Step, b: Step, w: float, d: Deployment) -> Step:
    def mix(x: float, y: float) -> float:
        return x + w * (y - x)

    def curve(x: Sequence[float], y: Sequence[float]) -> list[float]:
        first, last = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
        return list(first + w * (last - first))

    def trace(x: Trace, y: Trace) -> Trace:
        messages = [
            replace(
                m,
                size=mix(m.size, n.size),
                processes=m.processes if m.processes == n.processes else d.processes // m.stride,
            )
            for m, n in zip(x.messages, y.messages, strict=True)
        ]
        flops = Counter({dtype: round(mix(x.flops[dtype], y.flops[dtype])) for dtype in x.flops})
        live, gradients = curve(x.live, y.live), curve(x.gradients, y.gradients)
        return Trace(live, gradients, flops, mix(x.moved, y.moved), messages)

    first, last = asdict(a.resident), asdict(b.resident)
    resident = Resident(**{name: mix(first[name], last[name]) for name in first})
    return Step(resident, trace(a.passes, b.passes), trace(a.update, b.update))
