"""``oialr recipes``."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from hpc_oialr.cli.console import add_command, add_force, console
from hpc_oialr.outputs import new_folder
from hpc_oialr.recipes import batch_scripts, data_needed, find_recipe, recipes

EXAMPLES = """  oialr recipes
  oialr recipes fashion_mnist_vit > my_recipe.yaml
  oialr recipes --scripts .                                 (writes ./slurm, with a batch script for each recipe)"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(commands, "recipes", summary="list the recipes, or print one", examples=EXAMPLES)
    parser.add_argument("name", metavar="NAME", nargs="?", help="print this recipe's YAML")
    parser.add_argument(
        "--scripts", metavar="DIR", type=Path, help="write the batch scripts for sbatch into DIR/slurm"
    )
    add_force(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each, or a file; or write the batch scripts."""
    if arguments.scripts:
        return _write_scripts(arguments.scripts / "slurm", force=arguments.force)
    if arguments.name:
        console().print(find_recipe(arguments.name).read_text(encoding="utf-8"), markup=False, end="")
        return 0
    found = recipes()
    width = max(map(len, found))
    for name, description in found.items():
        console().print(f"{name:{width}}  {description} Data: {data_needed(name)}", markup=False)
    return 0


def _write_scripts(folder: Path, *, force: bool) -> int:
    with new_folder(folder, "oialr recipes --scripts", force=force) as draft:
        for script in batch_scripts():
            shutil.copy(script, draft)
    console().print(f"written: {folder}; e.g. sbatch --nodes=2 {folder}/fashion_mnist.sh", markup=False)
    return 0
