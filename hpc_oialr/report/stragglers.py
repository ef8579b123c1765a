"""Which rank held a run up, and by how much."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hpc_oialr.record.progress import STRAGGLES


def straggler(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """One sentence from the rows of ``metrics.jsonl``; None where ranks were not measured.

    The rank that was slowest most often counts, by the median over the rows in which it was.
    """
    measured = [row for row in rows if row.get("slowest_rank") is not None]
    if not measured:
        return None
    (rank, node), often = Counter((row["slowest_rank"], row["slowest_node"]) for row in measured).most_common(1)[0]
    own = [row for row in measured if row["slowest_rank"] == rank]
    ratio, late_s = (statistics.median(row[name] for row in own) for name in ("slowest_ratio", "slowest_late_s"))
    if ratio < STRAGGLES or often * 2 <= len(measured):
        usual = statistics.median(row["slowest_ratio"] for row in measured)
        return f"no rank is late all the time; the slowest one takes {usual:.2f} times the median rank's own time"
    return (
        f"rank {rank} on {node} holds the others up: {ratio:.2f} times the median rank's own time (data, forward pass), "
        f"{late_s:.3g} s a step, in {often} of {len(measured)} records"
    )
