"""What the rows say: each side's best rate, its metric and time at every length, and who is on the Pareto front."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from benchmarks.common import print_table
from benchmarks.rivals.jobs import best_rates
from benchmarks.rivals.problems import PROBLEMS
from benchmarks.rivals.sides import SIDES
from benchmarks.row_file import Row

BASE = "dense, Muon"
# The same in all tests of a side.
OF_A_SIDE = ("rate", "trained_share", "stored_share")


def seconds(timed: Row, steps: int) -> float:
    """A run of ``steps`` alone on its machine, from a row of mode "time": wall time on a GPU, else processor time."""
    mean = sum(phase["share"] * phase["step_ms"] for phase in timed["phases"]) / 1000
    return float(steps * mean + timed["events_s"])


def devices(rows: Sequence[Row], problem: str) -> list[str]:
    """Those whose times are known, CPUs last: "cuda", "cpu"."""
    mine = [row for row in rows if row["problem"] == problem and "failed" not in row]
    timed = {row["device"] for row in mine if row["mode"] == "time"}
    return sorted(timed | {"cpu" for row in mine if (row["mode"], row["device"]) == ("test", "cpu")}, reverse=True)


def table(rows: Sequence[Row], problem: str) -> list[Row]:
    """One row a side: ``rate`` and shares; by device ``peak_memory_mib``; by length its ``points``, each with ``metric``,
    a mean over the seeds, and by device ``seconds`` and ``front``.

    Steps are the same on all devices, so what was trained on one can be timed on another. Runs trained on a CPU have
    times of their own. ``front``: no other side, at whatever length, is at least as good in at most this time.
    """
    mine = [row for row in rows if row["problem"] == problem and "failed" not in row]
    timed = {(row["side"], row["device"]): row for row in mine if row["mode"] == "time"}
    best = best_rates(rows)
    # An earlier test may have had the rate that was best of fewer.
    tests = [r for r in mine if r["mode"] == "test" and r["rate"] == best.get((problem, r["side"]), r["rate"])]
    equal: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for row in tests:
        equal[row["side"], row["budget"]].append(row)
    points = []
    for (side, budget), found in equal.items():
        spent = {device: seconds(row, found[0]["steps"]) for (name, device), row in timed.items() if name == side}
        if all(row["device"] == "cpu" for row in found):
            spent["cpu"] = statistics.mean(row["cpu_s"] for row in found)
        metric = statistics.mean(row["metric"] for row in found)
        points.append({"side": side, "budget": budget, "metric": metric, "seconds": spent, "seeds": len(found)})
    better = PROBLEMS[problem].better
    for point in points:
        point["front"] = {
            device: not any(_beats(p, point, device, better) for p in points if device in p["seconds"])
            for device in point["seconds"]
        }
    return [
        {
            "side": side,
            "points": {p["budget"]: p for p in sorted(points, key=lambda p: p["budget"]) if p["side"] == side},
            "peak_memory_mib": {d: row["peak_memory_mib"] for (name, d), row in timed.items() if name == side},
            **{key: next((row[key] for row in tests if row["side"] == side), None) for key in OF_A_SIDE},
        }
        for side in SIDES
    ]


def _beats(p: dict[str, Any], point: dict[str, Any], device: str, better: Any) -> bool:
    mine, other = p["seconds"][device], point["seconds"][device]
    if better(p["metric"], point["metric"]):
        return bool(mine <= other)
    return bool(mine < other) and not better(point["metric"], p["metric"])


def print_summary(rows: Sequence[Row]) -> None:
    """A table for each problem and device; * marks the Pareto front of metric against time."""
    for problem in PROBLEMS:
        lines = [line for line in table(rows, problem) if line["points"]]
        for device in devices(rows, problem) if lines else ():
            print(f"\n{problem} ({PROBLEMS[problem].metric}; {device}):")
            base = next((line for line in lines if line["side"] == BASE), lines[0])["points"]
            shown = []
            for line in lines:
                cells = {"side": line["side"], "rate": line["rate"]}
                for budget, p in line["points"].items():
                    cells[f"x{budget:g}"] = _cell(p, base.get(budget), device)
                cells |= {key: line[key] for key in ("trained_share", "stored_share")}
                shown.append(cells | {"peak_memory_mib": line["peak_memory_mib"].get(device)})
            keys = list(dict.fromkeys(key for cells in shown for key in cells))
            print_table([{key: cells.get(key) for key in keys} for cells in shown])


def _cell(point: dict[str, Any], base: dict[str, Any] | None, device: str) -> str:
    if device not in point["seconds"]:
        return f"{point['metric']:.4f}"
    taken = point["seconds"][device]
    ratio = f" {taken / base['seconds'][device]:.2f}" if base and device in base["seconds"] else ""
    return f"{point['metric']:.4f}{'*' if point['front'][device] else ' '} {taken:.1f} s{ratio}"
