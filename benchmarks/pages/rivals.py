"""OIALR beside what a user could pick instead: a table for each problem."""

from __future__ import annotations

from benchmarks.pages.tables import load, origin, table
from benchmarks.rivals.problems import PROBLEMS
from benchmarks.rivals.summary import BASE
from benchmarks.rivals.summary import table as lines_of


def rivals() -> str:
    """Metric at every length, time over dense Muon's of the same length, and who is on the Pareto front."""
    result = load("rivals")
    rows = result["rows"]
    parts = []
    for name, problem in PROBLEMS.items():
        lines = [line for line in lines_of(rows, name) if line["points"]]
        if not lines:
            continue
        base = next(line for line in lines if line["side"] == BASE)["points"]
        lengths = sorted({length for line in lines for length in line["points"]})
        tried = sorted({row["rate"] for row in rows if row["problem"] == name and row["mode"] == "tune"})
        factor, unit = (100, " %") if problem.metric == "accuracy" else (1, "")
        shown = []
        for line in sorted(lines, key=lambda line: line["side"] != BASE):
            cells = [
                line["side"] + (" (rate at the end of the range)" if line["rate"] in (tried[0], tried[-1]) else "")
            ]
            for length in lengths:
                point = line["points"].get(length)
                ratio = point["seconds"] / base[length]["seconds"] if point and length in base else None
                cells += [
                    f"{factor * point['metric']:.{1 if unit else 3}f}{unit}{' *' if point['front'] else ''}"
                    if point
                    else "",
                    f"x {ratio:.2f}" if ratio else "",
                ]
            shown.append((*cells, f"{line['trained_share']:.1%}", f"{line['stored_share']:.1%}"))
        columns = [cell for length in lengths for cell in (f"{problem.metric}, length {length:g}", "time")]
        steps = f"{problem.title}, length 1 = {problem.steps} steps of {problem.batch}:"
        parts.append(f"{steps}\n\n{table(('side', *columns, 'trained', 'stored'), shown)}")
    return "\n\n".join(parts) + "\n" + origin("rivals", result["environment"])
