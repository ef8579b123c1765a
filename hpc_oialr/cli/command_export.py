"""Write a run's model as safetensors, dense or with its factors."""

from __future__ import annotations

import argparse

from hpc_oialr.cli.console import add_out, add_run, show

EXAMPLES = """  oialr export runs/first --format dense
  oialr export runs/first --format lowrank --step 500 --out my_model"""


def add(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    option = parser.add_argument
    explained = "dense: loads into the stock class; lowrank: U, S and Vh of every layer (default: dense)"
    option("--format", choices=("dense", "lowrank"), default="dense", help=explained)
    option("--step", type=int, metavar="N", help="checkpoint to take; default the last")
    add_out(parser, "DIR", "folder to write; default RUN/export/FORMAT")


def run(arguments: argparse.Namespace) -> None:
    from hpc_oialr.serve.export import export

    options = {name: getattr(arguments, name) for name in ("out", "step", "force")}
    show(export(arguments.folder, arguments.format, **options))
