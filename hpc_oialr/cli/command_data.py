"""``oialr data``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hpc_oialr.cli.console import add_command, add_force, console, show_warnings

EXAMPLES = """  oialr data fetch fashion-mnist
  oialr data fetch fashion-mnist --data-dir /scratch/data
  oialr data sample imagenet samples/imagenet"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    summary = "fetch a data set once, checked by its checksums"
    parser = add_command(commands, "data", summary="fetch data sets, make tiny ones", examples=EXAMPLES)
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    fetch = add_command(actions, "fetch", summary=summary, examples=EXAMPLES)
    fetch.add_argument("name", metavar="NAME", help="name of the data set, e.g. fashion-mnist")
    fetch.add_argument("--data-dir", type=Path, metavar="DIR", help="folder that has it, or where to put it")
    add_force(fetch)
    fetch.set_defaults(run=run)
    summary = "make a tiny stand-in of a data set's form, for smoke runs only"
    sample = add_command(actions, "sample", summary=summary, examples=EXAMPLES)
    sample.add_argument("name", metavar="NAME", help="imagenet, cifar-10 or ettm2")
    sample.add_argument(
        "folder", metavar="DIR", type=Path, help="new folder; left as it is if it has the sample"
    )
    sample.set_defaults(run=run_sample)


def run_sample(arguments: argparse.Namespace) -> int:
    """Make the sample, then print the folder."""
    from hpc_oialr.data import write_sample

    show_warnings()
    console().print(str(write_sample(arguments.name, arguments.folder)), markup=False)
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Fetch, then print the folder."""
    from hpc_oialr.data import fetch

    show_warnings()
    console().print(str(fetch(arguments.name, arguments.data_dir, force=arguments.force)), markup=False)
    return 0
