"""Leading functions of operators, and the streamed SVD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.pages.tables import load, origin, table

TITLES = {
    "matrix": "random matrix, 400 x 300: singular values",
    "harmonic_oscillator": "harmonic oscillator: energies",
    "hydrogen": "hydrogen atom: energies",
}


def _range(values: Sequence[float], form: str) -> str:
    """The smallest and the largest, or the only one."""
    low, high = (form.format(value) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def operators() -> str:
    """What was found, over nestings and seeds."""
    result = load("operators")
    groups: dict[tuple[str, str, bool], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["problem"], row["nesting"], row["balance"]), []).append(row)
    rows = []
    for (problem, nesting, balance), found in groups.items():
        aligned = [row["worst_alignment"] for row in found]
        rows.append(
            (
                TITLES[problem],
                str(found[0]["functions"]),
                f"{nesting}, balanced" if balance else nesting,
                str(len(found)),
                _range([100 * row["worst_value"] for row in found], "{:.2g}") + " %",
                "" if None in aligned else _range(aligned, "{:.6f}"),
                _range([row["cpu_seconds"] for row in found], "{:.0f}") + " s",
            )
        )
    header = ("values", "how many", "nesting", "seeds", "largest error of a value", "smallest alignment", "time")
    return table(header, rows) + "\n" + origin("operators", result["environment"])


def operators_distributed() -> str:
    """Gradients on several processes."""
    result = load("operators")
    rows = [(row["problem"], str(row["processes"]), f"{row['difference']:.1e}") for row in result["distributed"]]
    return (
        table(("recipe", "processes", "difference of the gradient"), rows)
        + "\n"
        + origin("operators", result["environment"])
    )


def streaming() -> str:
    """Errors, times and memory of truncated SVDs."""
    result = load("operators")
    rows = [
        (
            row["method"],
            f"{row['error'] - 1:.3%}",
            f"{row['time']:.2f}",
            "" if row["passes"] is None else str(row["passes"]),
            f"{row['rows_held']:,}",
        )
        for row in result["streaming"]
    ]
    first = result["streaming"][0]
    size = f"\n{first['m']:,} x {first['n']:,}, r = {first['r']}, fp32, one thread."
    header = ("method", "error above the best", "time / streaming_svd", "passes", "rows in memory")
    return table(header, rows) + "\n" + size + "\n" + origin("operators", result["environment"])
