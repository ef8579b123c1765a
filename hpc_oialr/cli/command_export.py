"""``oialr export``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hpc_oialr.cli.console import add_command, add_force, console, show_warnings

EXAMPLES = """  oialr export runs/first --format dense
  oialr export runs/first --format lowrank --step 500 --out my_model"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    summary = "write a run's model as safetensors, dense or with its factors"
    parser = add_command(commands, "export", summary=summary, examples=EXAMPLES)
    parser.add_argument("folder", metavar="RUN", type=Path, help="folder of the run")
    parser.add_argument(
        "--format",
        choices=("dense", "lowrank"),
        default="dense",
        help="dense: loads into the stock class; lowrank: U, S and Vh of every layer (default: dense)",
    )
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to take; default the last")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write; default RUN/export/FORMAT")
    add_force(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Export, then print the folder."""
    from hpc_oialr.export import export

    show_warnings()
    folder = export(
        arguments.folder, arguments.format, out=arguments.out, step=arguments.step, force=arguments.force
    )
    console().print(str(folder), markup=False)
    return 0
