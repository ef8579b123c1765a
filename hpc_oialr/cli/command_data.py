"""``oialr data``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hpc_oialr.cli.console import add_command, console, show_warnings

EXAMPLES = """  oialr data fetch fashion-mnist
  oialr data fetch fashion-mnist --data-dir /scratch/data"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    summary = "fetch a data set once, checked by its checksums"
    parser = add_command(commands, "data", summary=summary, examples=EXAMPLES)
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    fetch = add_command(actions, "fetch", summary=summary, examples=EXAMPLES)
    fetch.add_argument("name", metavar="NAME", help="name of the data set, e.g. fashion-mnist")
    fetch.add_argument("--data-dir", type=Path, metavar="DIR", help="folder that has it, or where to put it")
    fetch.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Fetch, then print the folder."""
    from hpc_oialr.data import fetch

    show_warnings()
    console().print(str(fetch(arguments.name, arguments.data_dir)), markup=False)
    return 0
