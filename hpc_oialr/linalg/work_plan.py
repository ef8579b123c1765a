"""Load-balanced assignment of SVDs to ranks: longest processing time first, equal shapes together, large ones shared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# A layer is shared if each process then has at most this part of the work that one alone would have.
WORTH_SHARING = 0.8
# Numbers that are held for the layers of one batch, unless a single one has more: 32 MiB in fp32.
BATCH_NUMBERS = 1 << 23


def svd_cost(m: int, n: int, processes: int = 1) -> float:
    """Floating-point operations of a thin SVD, for the busiest of the processes that share it.

    ``6 max(m, n) k^2 / P`` for the long side, ``20 k^3`` for the last SVD, which one does while all wait, and
    ``20/3 k^3 log2 P`` in the tree; k = min(m, n). So sharing pays for long matrices, never for square ones.

    Examples
    --------
    >>> svd_cost(10, 10), svd_cost(1000, 10), svd_cost(1000, 10, 2)
    (26000.0, 620000.0, 326666.6666666667)
    """
    k = min(m, n)
    return 6.0 * max(m, n) * k * k / processes + 20.0 * k**3 * (1 + math.log2(processes) / 3)


@dataclass(frozen=True)
class LayerWork:
    """One matrix to factorise, m x n.

    Attributes
    ----------
    cost
        Relative to the others; default :func:`svd_cost`.
    held
        Numbers that must be there meanwhile; default ``m n``.
    """

    name: str
    m: int
    n: int
    cost: float | None = None
    held: int | None = None

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
    least loaded ones, if it is long enough for that to pay. The others go by longest processing time first,
    each to one process; those of one shape that meet on a process become one batch. Shared layers come first,
    in one order for all, so that nobody waits for a process that waits for another. A pure function of layers
    and P.

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
    def of(
        cls,
        layers: Sequence[LayerWork],
        processes: int,
        *,
        share: bool = True,
        batch_numbers: int = BATCH_NUMBERS,
    ) -> WorkPlan:
        """Make the plan.

        Parameters
        ----------
        share
            False keeps every layer on one process.
        batch_numbers
            Numbers held for one batch; 0 makes no batches.

        Examples
        --------
        >>> plan = WorkPlan.of([LayerWork("a", 64, 64), LayerWork("b", 64, 64), LayerWork("c", 96, 64)], 2)
        >>> [(task.processes, task.layers) for task in plan.tasks]
        [((0,), (2,)), ((1,), (0, 1))]
        """
        loads = [0.0] * processes
        fair = sum(layer.work for layer in layers) / processes
        dearest = sorted(range(len(layers)), key=lambda i: (-layers[i].work, i))
        candidates = [i for i in dearest if share and layers[i].work > fair]
        shared = [task for i in candidates if (task := _shared(i, layers[i], fair, loads)) is not None]
        rest = sorted(set(range(len(layers))) - {task.layers[0] for task in shared})
        owners = longest_processing_time([layers[i].work for i in rest], processes, start=loads)
        alone = _batches(layers, dict(zip(rest, owners, strict=True)), batch_numbers)
        return cls(tuple(layers), processes, (*shared, *alone))

    @classmethod
    def with_owners(
        cls,
        layers: Sequence[LayerWork],
        owners: Sequence[int],
        processes: int,
        *,
        batch_numbers: int = BATCH_NUMBERS,
    ) -> WorkPlan:
        """The plan in which each layer is factorised by its given process."""
        tasks = _batches(layers, dict(enumerate(owners)), batch_numbers)
        return cls(tuple(layers), processes, tuple(tasks))

    def of_process(self, rank: int) -> list[Task]:
        """What process ``rank`` does, in order."""
        return [task for task in self.tasks if rank in task.processes]

    def rounds(self) -> list[list[Task]]:
        """Tasks that may go on at the same time: each process has at most one in a round.

        Examples
        --------
        >>> plan = WorkPlan.with_owners([LayerWork("a", 9, 9), LayerWork("b", 8, 8), LayerWork("c", 7, 7)], [1, 0, 1], 2)
        >>> [[task.layers for task in tasks] for tasks in plan.rounds()]
        [[(1,), (0,)], [(2,)]]
        """
        found: list[list[Task]] = []
        done = [0] * self.processes
        for task in self.tasks:
            when = max(done[p] for p in task.processes)
            found.extend([] for _ in range(when + 1 - len(found)))
            found[when].append(task)
            for p in task.processes:
                done[p] = when + 1
        return found


def _shared(index: int, layer: LayerWork, fair: float, loads: list[float]) -> Task | None:
    """Give a large layer to the least loaded processes and add to their loads; None if that does not pay."""
    size = min(len(loads), math.ceil(layer.work / fair))
    part = svd_cost(layer.m, layer.n, size) / svd_cost(layer.m, layer.n)
    if part > WORTH_SHARING:
        return None
    members = sorted(sorted(range(len(loads)), key=lambda p: (loads[p], p))[:size])
    for p in members:
        loads[p] += layer.work * part
    return Task((index,), tuple(members), layer.work * part)


def _batches(layers: Sequence[LayerWork], owners: Mapping[int, int], batch_numbers: int) -> list[Task]:
    """Layers of one shape and owner together, as many as may be held; each owner's dearest batch first."""
    open_batches: dict[tuple[int, int, int], list[int]] = {}
    held: dict[tuple[int, int, int], int] = {}
    batches: list[tuple[int, list[int]]] = []
    for i, owner in owners.items():
        layer = layers[i]
        alike, numbers = (owner, layer.m, layer.n), layer.m * layer.n if layer.held is None else layer.held
        if alike not in open_batches or held[alike] + numbers > batch_numbers:
            open_batches[alike], held[alike] = [], 0
            batches.append((owner, open_batches[alike]))
        open_batches[alike].append(i)
        held[alike] += numbers
    tasks = [Task(tuple(batch), (owner,), sum(layers[i].work for i in batch)) for owner, batch in batches]
    return sorted(tasks, key=lambda task: (task.processes, -task.load, task.layers))


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
