"""Show versions of torch, CUDA, MPI, NCCL, HDF5 and DeepSpeed, the machine and the git commit."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from hpc_oialr.cli.console import console, show

EXAMPLES = """  oialr info
  oialr info --json"""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    """Print what every run writes into its environment.json."""
    from hpc_oialr.record import environment_report

    report = environment_report()
    if arguments.json:
        show(json.dumps(report, indent=2))
        return
    table = Table(show_header=False)
    for name, value in _flatten(report):
        table.add_row(name, value)
    console().print(table)


def _flatten(report: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values as text; a dash for what is not there.

    Examples
    --------
    >>> list(_flatten({"a": {"b": 1, "c": None}}))
    [('a.b', '1'), ('a.c', '-')]
    """
    for name, value in report.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", "-" if value is None else str(value)
