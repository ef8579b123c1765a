"""Who factorises which layer: longest processing time first."""

from __future__ import annotations

from collections.abc import Sequence


def longest_processing_time(costs: Sequence[float], processes: int) -> list[int]:
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

    Returns
    -------
    list of int
        For each job the process (0..P-1) that does it.

    Examples
    --------
    >>> longest_processing_time([1.0, 8.0, 2.0, 7.0], 2)
    [0, 0, 1, 1]
    """
    load = [0.0] * processes
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
