"""What the rows say: each side's best rate, its metric at every length, its time, and who is on the Pareto front."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from benchmarks.common import print_table
from benchmarks.rivals.problems import PROBLEMS
from benchmarks.rivals.sides import SIDES
from benchmarks.row_file import Row

BASE = "dense, Muon"


def seconds(timed: Row, steps: int) -> float:
    """Wall seconds of a run of ``steps`` alone on its machine, from a row of mode "time"."""
    mean = sum(phase["share"] * phase["step_ms"] for phase in timed["phases"]) / 1000
    return float(steps * mean + timed["events_s"])


def table(rows: Sequence[Row], problem: str) -> list[Row]:
    """One row a side: ``rate``; the ``metric`` by length, a mean over the seeds; ``seconds`` and ``front`` by length.

    Seconds are of processor time on a CPU, else wall time by rows of mode "time". ``front``: no other side, at whatever
    length, is at least as good in at most this time.
    """
    mine = [row for row in rows if row["problem"] == problem and "failed" not in row]
    timed = {row["side"]: row for row in mine if row["mode"] == "time"}
    tests: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for row in mine:
        if row["mode"] == "test":
            tests[row["side"], row["budget"]].append(row)
    points = []
    for (side, budget), found in tests.items():
        gpu = found[0]["device"] != "cpu"
        if gpu and side not in timed:
            continue
        spent = seconds(timed[side], found[0]["steps"]) if gpu else statistics.mean(r["cpu_s"] for r in found)
        metric = statistics.mean(r["metric"] for r in found)
        points.append({"side": side, "budget": budget, "metric": metric, "seconds": spent, "seeds": len(found)})
    better = PROBLEMS[problem].better
    for point in points:
        point["front"] = not any(
            (better(p["metric"], point["metric"]) and p["seconds"] <= point["seconds"])
            or (not better(point["metric"], p["metric"]) and p["seconds"] < point["seconds"])
            for p in points
        )
    return [_line(side, [p for p in points if p["side"] == side], mine, timed.get(side)) for side in SIDES]


def _line(side: str, points: list[dict[str, Any]], rows: list[Row], timed: Row | None) -> Row:
    mine = [row for row in rows if row["side"] == side]
    tests = [row for row in mine if row["mode"] == "test"]
    last = tests[0] if tests else None
    return {
        "side": side,
        "rate": last["rate"] if last else None,
        "points": {p["budget"]: p for p in sorted(points, key=lambda p: p["budget"])},
        "trained_share": last["trained_share"] if last else None,
        "stored_share": last["stored_share"] if last else None,
        "peak_memory_mib": timed["peak_memory_mib"] if timed else None,
    }


def print_summary(rows: Sequence[Row]) -> None:
    """A table a problem; * marks the Pareto front of metric against time."""
    for problem in PROBLEMS:
        lines = [line for line in table(rows, problem) if line["points"]]
        if not lines:
            continue
        print(f"\n{problem} ({PROBLEMS[problem].metric}):")
        base = next((line for line in lines if line["side"] == BASE), lines[0])["points"]
        shown = []
        for line in lines:
            cells = {"side": line["side"], "rate": line["rate"]}
            for budget, p in line["points"].items():
                ratio = p["seconds"] / base[budget]["seconds"] if budget in base else float("nan")
                cells[f"x{budget:g}"] = (
                    f"{p['metric']:.4f}{'*' if p['front'] else ' '} {p['seconds']:.1f} s {ratio:.2f}"
                )
            keys = ("trained_share", "stored_share", "peak_memory_mib")
            shown.append(cells | {key: line[key] for key in keys})
        keys = list(dict.fromkeys(key for cells in shown for key in cells))
        print_table([{key: cells.get(key) for key in keys} for cells in shown])
