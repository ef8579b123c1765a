"""List the recipes, or print one."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from hpc_oialr.cli.console import add_force, show
from hpc_oialr.outputs import new_folder
from hpc_oialr.recipes import batch_scripts, data_needed, find_recipe, recipes

EXAMPLES = """  oialr recipes
  oialr recipes fashion_mnist_vit > my_recipe.yaml
  oialr recipes --scripts .                                 (writes ./slurm, with a batch script for each recipe)"""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", help="print this recipe's YAML")
    parser.add_argument("--scripts", metavar="DIR", type=Path, help="write batch scripts into DIR/slurm")
    add_force(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print a line for each, or a file; or write the batch scripts."""
    if arguments.scripts:
        folder = arguments.scripts / "slurm"
        with new_folder(folder, "oialr recipes --scripts", force=arguments.force) as draft:
            for script in batch_scripts():
                shutil.copy(script, draft)
        show(f"written: {folder}; e.g. sbatch --nodes=2 {folder}/fashion_mnist.sh")
    elif arguments.name:
        show(find_recipe(arguments.name).read_text(encoding="utf-8"), end="")
    else:
        found = recipes()
        width = max(map(len, found))
        for name, description in found.items():
            show(f"{name:{width}}  {description} Data: {data_needed(name)}")
        show(
            "Those of OIALR also with --dense, the dense baseline, and --paper, the published method (arXiv 2401.08505)."
        )
