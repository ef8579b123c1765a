"""Who factorises which layer: longest processing time first, equal shapes together, large ones shared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Of a shared matrix's work, what each process adds: the tree, and the small SVD that all wait for.
SHARING_OVERHEAD = 0.15


def svd_cost(m: int, n: int) -> float:
    """Floating-point operations of a thin SVD, ``6 max(m, n) k^2 + 20 k^3``, k = min(m, n).

    Examples
    --------
    >>> svd_cost(10, 10)
    26000.0
    """
    k = min(m, n)
    return 6.0 * max(m, n) * k * k + 20.0 * k**3


@dataclass(frozen=True)
class LayerWork:
    """One matrix to factorise, m x n; ``cost`` relative to the others, default :func:`svd_cost`."""

    name: str
    m: int
    n: int
    cost: float | None = None

    @property
    def work(self) -> float:
        """The cost that counts."""
        return svd_cost(self.m, self.n) if self.cost is None else self.cost


@dataclass(frozen=True)
class Task:
    """What some processes do together, or one alone.

    Attributes
    ----------
    layers
        Indices of the layers: several of one shape in one batch, or a single one.
    processes
        Who does it, ascending; several only for a single layer.
    load
        Cost for each of them.
    """

    layers: tuple[int, ...]
    processes: tuple[int, ...]
    load: float


@dataclass(frozen=True)
class WorkPlan:
    """Which process factorises which layers, in what order.

    A layer dearer than a fair share (all costs / P) goes to as many processes as it has fair shares, the
    least loaded ones. The others go by longest processing time first, each to one process; those
    of one shape that meet on a process become one batch. Shared layers come first, in one order for all, so
    that nobody waits for a process that waits for another. A pure function of layers and P.

    Attributes
    ----------
    layers, processes
        What the plan was made for.
    tasks
        In the order in which each process goes through its own.
    """

    layers: tuple[LayerWork, ...]
    processes: int
    tasks: tuple[Task, ...]

    @classmethod
    def of(cls, layers: Sequence[LayerWork], processes: int, *, share: bool = True) -> WorkPlan:
        """Make the plan; ``share=False`` keeps every layer on one process.

        Examples
        --------
        >>> print(WorkPlan.of([LayerWork("a", 64, 64), LayerWork("b", 64, 64), LayerWork("c", 96, 64)], 2))
        process    shape  batch  load %  layers
              0  96 x 64      1    35.8  c
              1  64 x 64      2    64.2  a, b
        balance (busiest / mean) 1.28
        """
        loads = [0.0] * processes
        fair = sum(layer.work for layer in layers) / processes
        large = [i for i, layer in enumerate(layers) if share and processes > 1 and layer.work > fair]
        shared = [_shared(i, layers[i].work, fair, loads) for i in _dearest_first(large, layers)]
        rest = [i for i in range(len(layers)) if i not in large]
        owners = longest_processing_time([layers[i].work for i in rest], processes, start=loads)
        batches: dict[tuple[int, int, int], list[int]] = {}
        for i, owner in zip(rest, owners, strict=True):
            batches.setdefault((owner, layers[i].m, layers[i].n), []).append(i)
        alone = [
            Task(tuple(batch), (owner,), sum(layers[i].work for i in batch))
            for (owner, _, _), batch in batches.items()
        ]
        alone.sort(key=lambda task: (task.processes, -task.load, task.layers))
        return cls(tuple(layers), processes, (*shared, *alone))

    def of_process(self, rank: int) -> list[Task]:
        """What process ``rank`` does, in order."""
        return [task for task in self.tasks if rank in task.processes]

    def loads(self) -> list[float]:
        """Cost of each process."""
        return [sum(task.load for task in self.of_process(rank)) for rank in range(self.processes)]

    def balance(self) -> float:
        """Busiest over mean load; 1 is perfect."""
        loads = self.loads()
        return max(loads) * self.processes / sum(loads) if sum(loads) else 1.0

    def __str__(self) -> str:
        total = sum(self.loads()) or 1.0
        lines = [("process", "shape", "batch", "load %", "layers")]
        for task in self.tasks:
            first = self.layers[task.layers[0]]
            share = 100 * task.load * len(task.processes) / total
            names = ", ".join(self.layers[i].name for i in task.layers)
            who = "+".join(map(str, task.processes))
            lines.append((who, f"{first.m} x {first.n}", str(len(task.layers)), f"{share:.1f}", names))
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        table = ["  ".join([*(line[i].rjust(widths[i]) for i in range(4)), line[4]]) for line in lines]
        return "\n".join([*table, f"balance (busiest / mean) {self.balance():.2f}"])


def _dearest_first(indices: Sequence[int], layers: Sequence[LayerWork]) -> list[int]:
    return sorted(indices, key=lambda i: (-layers[i].work, i))


def _shared(index: int, work: float, fair: float, loads: list[float]) -> Task:
    """Give a large layer to the least loaded processes and add to their loads."""
    size = min(len(loads), math.ceil(work / fair))
    members = sorted(sorted(range(len(loads)), key=lambda p: (loads[p], p))[:size])
    load = work * (1 / size + SHARING_OVERHEAD)
    for p in members:
        loads[p] += load
    return Task((index,), tuple(members), load)


def longest_processing_time(
    costs: Sequence[float], processes: int, *, start: Sequence[float] | None = None
) -> list[int]:
    """Deal jobs to processes so that the busiest one finishes early.

    The costliest job goes first, each to the process with the least work so far; ties go to the
    lower index. A pure function, so that every process finds the same plan without a message.
    At most ``4/3 - 1/(3 P)`` of the optimum (Graham, SIAM J. Appl. Math. 17, 1969).

    Parameters
    ----------
    costs
        One non-negative cost per job.
    processes
        Number of processes P.
    start
        What each process has to do already; default nothing.

    Returns
    -------
    list of int
        For each job the process (0..P-1) that does it.

    Examples
    --------
    >>> longest_processing_time([1.0, 8.0, 2.0, 7.0], 2)
    [0, 0, 1, 1]
    """
    load = list(start or [0.0] * processes)
    owner = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner[job] = min(range(processes), key=lambda p: (load[p], p))
        load[owner[job]] += costs[job]
    return owner


def rounds(owners: Sequence[int], processes: int) -> list[list[int]]:
    """Group jobs so that each process has at most one job in a round, in order of index.

    Bounds memory: what one round computes is sent and applied before the next one begins.

    Examples
    --------
    >>> rounds([1, 0, 1, 1], 2)
    [[0, 1], [2], [3]]
    """
    queues = [[job for job, owner in enumerate(owners) if owner == p] for p in range(processes)]
    depth = max((len(queue) for queue in queues), default=0)
    return [sorted(queue[i] for queue in queues if i < len(queue)) for i in range(depth)]
