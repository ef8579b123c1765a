"""What a search can optimise."""

from __future__ import annotations

# As summary.json calls it, and whether less is better; None: the task knows. The metric is that on validation data.
OBJECTIVES: dict[str, bool | None] = {
    "metric": None,
    "wall_s": True,
    "trainable_params": True,
    "peak_memory_gib": True,
}
