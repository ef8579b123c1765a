"""``oialr recipes``."""

from __future__ import annotations

import argparse
from typing import Any

from hpc_oialr.cli.console import add_command, console
from hpc_oialr.recipes import data_needed, find_recipe, recipes

EXAMPLES = """  oialr recipes
  oialr recipes fashion_mnist_vit > my_recipe.yaml"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(commands, "recipes", summary="list the recipes, or print one", examples=EXAMPLES)
    parser.add_argument("name", metavar="NAME", nargs="?", help="print this recipe's YAML")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each, or a file."""
    if arguments.name:
        console().print(find_recipe(arguments.name).read_text(encoding="utf-8"), markup=False, end="")
        return 0
    found = recipes()
    width = max(map(len, found))
    for name, description in found.items():
        console().print(f"{name:{width}}  {description} Data: {data_needed(name)}", markup=False)
    return 0
