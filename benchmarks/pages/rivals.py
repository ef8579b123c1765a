"""OIALR beside what a user could pick instead: a table for each problem."""

from __future__ import annotations

from typing import Any

from benchmarks.pages.tables import load, origins, table
from benchmarks.rivals.problems import PROBLEMS, Problem
from benchmarks.rivals.summary import BASE, devices
from benchmarks.rivals.summary import table as lines_of

DEVICES = {"cuda": "GPU time", "cpu": "CPU time"}


def rivals() -> str:
    """Metric at every length, times over dense Muon's of the same length, and who is on the Pareto front."""
    results = {name: load(name) for name in ("rivals", "rivals_cpu")}
    rows = [row for result in results.values() for row in result["rows"]]
    parts = [_part(rows, problem) for problem in PROBLEMS.values()]
    return "\n\n".join(part for part in parts if part) + "\n" + origins(results)


def _part(rows: list[dict[str, Any]], problem: Problem) -> str:
    lines = [line for line in lines_of(rows, problem.name) if line["points"]]
    base = next((line for line in lines if line["side"] == BASE), None)
    if base is None:
        return ""
    lengths = sorted({length for line in lines for length in line["points"]})
    tried = sorted({row["rate"] for row in rows if row["problem"] == problem.name and row["mode"] == "tune"})
    places = devices(rows, problem.name)
    shown = []
    for line in sorted(lines, key=lambda line: line["side"] != BASE):
        at_end = line["rate"] in (tried[0], tried[-1])
        cells = [line["side"] + (" (rate at the end of the range)" if at_end else "")]
        for length in lengths:
            point = line["points"].get(length)
            cells.append(_metric(problem, point["metric"]) if point else "")
            cells += [_time(point, base["points"].get(length), place) for place in places]
        shown.append((*cells, f"{line['trained_share']:.1%}", f"{line['stored_share']:.1%}"))
    columns = [
        cell
        for length in lengths
        for cell in (f"{problem.metric}, length {length:g}", *(DEVICES[place] for place in places))
    ]
    steps = f"{problem.title}, length 1 = {problem.steps} steps of {problem.batch}:"
    return f"{steps}\n\n{table(('side', *columns, 'trained', 'stored'), shown)}"


def _metric(problem: Problem, value: float) -> str:
    return f"{100 * value:.1f} %" if problem.metric == "accuracy" else f"{value:.3f}"


def _time(point: dict[str, Any] | None, base: dict[str, Any] | None, place: str) -> str:
    if not point or not base or place not in point["seconds"] or place not in base["seconds"]:
        return ""
    ratio = point["seconds"][place] / base["seconds"][place]
    return f"x {ratio:.2f}{' *' if point['front'][place] else ''}"
