"""``oialr train``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from hpc_oialr.cli.console import add_command, console, show_warnings, summary_table

EXAMPLES = """  oialr train fashion_mnist_vit
  oialr train fashion_mnist_vit --train.epochs 1 --oialr.delay 100 --out runs/first
  oialr train fashion_mnist_vit --oialr null                       (dense)
  oialr train fashion_mnist_vit --oialr.rule RelativeCutoff --oialr.rule.beta 0.2
  oialr train my_recipe.yaml --print_config
  torchrun --nproc-per-node 2 -m hpc_oialr train fashion_mnist_vit

Every setting and its default: oialr train RECIPE --print_config; what they mean: --help_settings.
Later wins: defaults < recipe < command line."""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands, "train", summary="train a recipe or a YAML file", examples=EXAMPLES, takes_settings=True
    )
    parser.add_argument(
        "recipe", metavar="RECIPE|FILE", help="name of a recipe (see oialr recipes), or a YAML file"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="run folder; default runs/RECIPE-TIME")
    parser.add_argument("--print_config", action="store_true", help="print all settings as YAML and stop")
    parser.add_argument("--help_settings", action="store_true", help="explain all settings and stop")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, then print the folder and a table."""
    from hpc_oialr.train.load_config import load_config, make_parser

    if arguments.help_settings:
        console().print(make_parser("oialr train RECIPE").format_help(), markup=False)
        return 0
    loaded = load_config(arguments.recipe, arguments.settings)
    if arguments.print_config:
        console().print(loaded.text, markup=False, end="")
        return 0
    from hpc_oialr.train.run import train

    show_warnings()
    folder = arguments.out or default_folder(arguments.recipe)
    result = train(loaded, folder)
    finish(result)
    return 0


def default_folder(recipe: str) -> Path:
    """``runs/RECIPE-TIME``."""
    return Path("runs") / f"{Path(recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def finish(result: Any) -> None:
    """Print the closing table and the run's folder."""
    out = console()
    if result.summary is not None:
        out.print(summary_table(result.summary, _processes(result.summary)))
    else:
        out.print(f"stopped on request; go on with: oialr resume {result.folder}", markup=False)
    out.print(f"run folder: {result.folder}", markup=False)


def _processes(summary: dict[str, Any]) -> str:
    return f"{summary['world_size']} process{'es' * (summary['world_size'] > 1)}, seed {summary['seed']}"
