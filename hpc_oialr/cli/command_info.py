"""Show versions of torch, CUDA, MPI, NCCL, HDF5 and DeepSpeed, the machine and the git commit."""

from __future__ import annotations

import argparse
import json

from rich.table import Table

from hpc_oialr.cli.console import console, show

EXAMPLES = """  oialr info
  oialr info --json"""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    """Print what every run writes into its environment.json."""
    from hpc_oialr.record import environment_report
    from hpc_oialr.train.load_config import flat

    report = environment_report()
    if arguments.json:
        show(json.dumps(report, indent=2))
        return
    table = Table(show_header=False)
    for name, value in flat(report).items():
        table.add_row(name, "-" if value is None else str(value))
    console().print(table)
