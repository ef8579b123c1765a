"""Result files and Markdown, for the pages' tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> dict[str, Any]:
    """A committed result file."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def origin(name: str, environment: dict[str, Any]) -> str:
    """One line: file, machine, versions, date."""
    machine, packages = environment["machine"], environment["packages"]
    where = f"{machine['cpu']}, {machine['cores']} cores"
    return f"\n*`benchmarks/results/{name}.json`: {where}, torch {packages['torch']}, {environment['date'][:10]}.*"


def origins(results: Mapping[str, dict[str, Any]]) -> str:
    """A line for each file, by its name."""
    return "".join(origin(name, result["environment"]) for name, result in results.items())
