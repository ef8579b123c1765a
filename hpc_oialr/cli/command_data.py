"""Fetch data sets, make tiny ones."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpc_oialr.cli.console import add_command, add_force, show

EXAMPLES = """  oialr data fetch fashion-mnist
  oialr data fetch fashion-mnist --data-dir /scratch/data
  oialr data sample imagenet samples/imagenet"""


def add(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    summary = "fetch a data set once, checked by its checksums"
    fetch = add_command(actions, "fetch", run_fetch, summary=summary, examples=EXAMPLES)
    fetch.add_argument("name", metavar="NAME", help="name of the data set, e.g. fashion-mnist")
    fetch.add_argument("--data-dir", type=Path, metavar="DIR", help="folder that has it, or where to put it")
    add_force(fetch)
    summary = "make a tiny stand-in of a data set's form, for smoke runs only"
    sample = add_command(actions, "sample", run_sample, summary=summary, examples=EXAMPLES)
    sample.add_argument("name", metavar="NAME", help="imagenet, cifar-10 or ettm2")
    sample.add_argument("folder", metavar="DIR", type=Path, help="new folder, or one with this sample")


def run_sample(arguments: argparse.Namespace) -> None:
    from hpc_oialr.data import write_sample

    show(write_sample(arguments.name, arguments.folder))


def run_fetch(arguments: argparse.Namespace) -> None:
    from hpc_oialr.data import fetch

    show(fetch(arguments.name, arguments.data_dir, force=arguments.force))
