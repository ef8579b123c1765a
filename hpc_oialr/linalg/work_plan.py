"""Load-balanced scheduling of SVDs: longest processing time first, equal shapes of a rank in one batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

# Numbers held for the layers of one batch, unless a single layer has more: 64 MiB in fp32. gram_svd needs 24 times as
# much meanwhile, so a batch is smaller where that would make a new peak of memory. A batch waits for the GPU twice, in
# torch.linalg.svd: all cores of a ViT-B/16 up to r = k/2, or 56 of r = 512, are in one.
BATCH_NUMBERS = 1 << 24


@dataclass(frozen=True)
class LayerWork:
    """One m x n matrix to factorize; ``held`` numbers are in memory during its SVD, ``m n`` by default."""

    name: str
    m: int
    n: int
    held: int | None = None

    @property
    def numbers(self) -> int:
        """``held``, or m n."""
        return self.m * self.n if self.held is None else self.held


@dataclass(frozen=True)
class Task:
    """Indices of layers of one shape that one rank factorizes in one batch, and the cost of it."""

    layers: tuple[int, ...]
    rank: int
    load: float


def svd_cost(m: int, n: int, processes: int = 1) -> float:
    """Floating-point operations of a thin SVD, or of a TSQR-SVD for the busiest of P processes.

    ``6 max(m, n) k^2 / P`` for the long side, ``20 k^3`` for the last SVD, which one process does while all wait, and
    ``20/3 k^3 log2 P`` in the tree; k = min(m, n).

    >>> svd_cost(10, 10), svd_cost(1000, 10), svd_cost(1000, 10, 2)
    (26000.0, 620000.0, 326666.6666666667)
    """
    k = min(m, n)
    return 6.0 * max(m, n) * k * k / processes + 20.0 * k**3 * (1 + math.log2(processes) / 3)


def longest_processing_time(costs: Sequence[float], processes: int) -> list[int]:
    """The rank that does each job, so that the busiest rank finishes early.

    The costliest job goes first, each to the rank with the least work so far; ties go to the lower index. A pure
    function: all ranks compute the same assignment without communication. At most ``4/3 - 1/(3 P)`` of the optimum
    (Graham, SIAM J. Appl. Math. 17, 1969).

    >>> longest_processing_time([1.0, 8.0, 2.0, 7.0], 2)
    [0, 0, 1, 1]
    """
    load = [0.0] * processes
    owner = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner[job] = min(range(processes), key=lambda p: (load[p], p))
        load[owner[job]] += costs[job]
    return owner


def svd_rounds(
    layers: Sequence[LayerWork],
    processes: int,
    *,
    owners: Sequence[int] | None = None,
    batch_numbers: int = BATCH_NUMBERS,
) -> list[list[Task]]:
    """Which rank factorizes which layers, in rounds: in a round each rank has at most one task.

    ``owners`` are the ranks of the layers, by default :func:`longest_processing_time` by :func:`svd_cost`. A batch of
    layers of one shape may hold ``batch_numbers`` numbers; 0 makes no batches.

    >>> layers = [LayerWork("a", 64, 64), LayerWork("b", 64, 64), LayerWork("c", 96, 64)]
    >>> [[(task.rank, task.layers) for task in tasks] for tasks in svd_rounds(layers, 2)]
    [[(0, (2,)), (1, (0, 1))]]
    """
    costs = [svd_cost(layer.m, layer.n) for layer in layers]
    if owners is None:
        owners = longest_processing_time(costs, processes)
    batches: list[list[list[int]]] = [[] for _ in range(processes)]
    # By rank and shape: the batch that is being filled, and how many more numbers it may hold.
    latest: dict[tuple[int, int, int], tuple[list[int], int]] = {}
    for i, (layer, rank) in enumerate(zip(layers, owners, strict=True)):
        alike, numbers = (rank, layer.m, layer.n), layer.numbers
        batch, room = latest.get(alike, ([], -1))
        if room < numbers:
            batch, room = [], batch_numbers
            batches[rank].append(batch)
        batch.append(i)
        latest[alike] = batch, room - numbers
    queues = [
        sorted(
            (Task(tuple(batch), rank, sum(costs[i] for i in batch)) for batch in mine),
            key=lambda task: (-task.load, task.layers),
        )
        for rank, mine in enumerate(batches)
    ]
    return [[task for task in tasks if task is not None] for tasks in zip_longest(*queues)]
