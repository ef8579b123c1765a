"""How often torch.compile has had to compile."""

from __future__ import annotations

import sys


def graphs_compiled() -> int:
    """Graphs that torch.compile has captured in this process so far; 0 if it was never used."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo is not None else 0
