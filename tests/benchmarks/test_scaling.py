"""The formula of the scaling study, and which steps it takes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.scaling import extrapolate, fit, nonnegative, steady


def made(side: str, scaling: str, nodes: int, megabytes: float, a_sample: float) -> dict[str, object]:
    """A row whose step takes what the formula says, at 2 ms latency and 50 MB/s, on two cores."""
    batch = 16 * (nodes if scaling == "weak" else 1)
    seconds = batch / nodes * max(1, nodes / 2) * a_sample + 2 * math.ceil(math.log2(nodes)) * 0.002
    seconds += 2 * (nodes - 1) / nodes * megabytes / 50
    row = {"engine": "DDP", "side": side, "scaling": scaling, "nodes": nodes, "processes": nodes, "batch": batch}
    return row | {"sent_mb": megabytes if nodes > 1 else 0.0, "step_s": seconds}


def test_the_formula_is_found_again() -> None:
    sides = {"dense": (40.0, 0.02), "OIALR": (2.0, 0.008)}
    shapes = [("strong", 1), ("strong", 2), ("strong", 4), ("weak", 2), ("weak", 4)]
    rows = [made(side, *shape, *figures) for side, figures in sides.items() for shape in shapes]
    found = fit(rows, cores=2)
    assert found["seconds_a_sample"] == pytest.approx({"dense": 0.02, "OIALR": 0.008})
    assert found["latency_s"] == pytest.approx(0.002)
    assert found["bytes_per_s"] == pytest.approx(50e6)
    assert found["mean_relative_error"] < 1e-9
    largest = {row["side"]: row for row in extrapolate(found, rows, "DDP") if row["processes"] == 4096}
    waiting = 24 * 0.002 + 2 * 4095 / 4096 * 2 / 50
    assert largest["OIALR"]["step_s"] == pytest.approx(16 * 0.008 + waiting)
    assert largest["OIALR"]["efficiency"] > largest["dense"]["efficiency"]


def test_no_figure_is_below_zero() -> None:
    A = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert nonnegative(A, np.array([3.0, 2.0, 1.0])).tolist() == [2.0, 0.0]  # the free fit falls
    assert nonnegative(A, A @ [2.0, 0.5]) == pytest.approx([2.0, 0.5])


def test_steps_are_those_of_the_last_phase(tmp_path: Path) -> None:
    rows, wall = [], 0.0
    for step in range(1, 21):
        wall += 5.0 if step < 8 else 1.0 + 10.0 * (step in (13, 17))  # dense; after an update, after an evaluation
        rows.append(
            {"step": step, "loss": 1.0, "wall_s": wall, "trained_share": 1.0 if step < 8 else 0.1, "energy_J": 7.0}
        )
    rows.append({"step": 16, "wall_s": wall, "split": "validation", "loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "updates.jsonl").write_text(json.dumps({"step": 12, "kind": "update"}) + "\n")
    assert steady(tmp_path) == (1.0, 7.0)
