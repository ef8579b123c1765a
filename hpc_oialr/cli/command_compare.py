"""Train a recipe and its dense baseline, same seed and data order, and compare them."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from hpc_oialr.cli.command_train import summary_rows
from hpc_oialr.cli.console import add_recipe, console, is_main, show
from hpc_oialr.errors import MissingExtraError
from hpc_oialr.exit_codes import FINISHED, STOPPED
from hpc_oialr.launch.job_main import stop_requests
from hpc_oialr.launch.slurm import job_over
from hpc_oialr.record.run_folder import default_folder

EXAMPLES = """  oialr compare fashion_mnist_vit --own
  oialr compare fashion_mnist_vit --train.epochs 1 --out runs/equal_steps
  oialr compare fashion_mnist_vit --own --dense.train.epochs 3"""


def add(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    option = parser.add_argument
    option("--own", action="store_true", help="dense run with its own settings, not with the same steps")
    option("--paper", action="store_true", help="compare the published method, with the recipe's paper settings")
    option("--out", metavar="DIR", type=Path, help="folder of both runs; default runs/RECIPE-TIME")


def run(arguments: argparse.Namespace) -> int:
    """Train both, then print a table, the plot's path and, last, the path of ``compare.json``."""
    from hpc_oialr.compare import compare, plot
    from hpc_oialr.record.owner import Claim
    from hpc_oialr.train.load_config import load_config, paper_variant

    loaded = load_config(arguments.recipe, arguments.settings)
    loaded = paper_variant(loaded) if arguments.paper else loaded
    folder = arguments.out or default_folder(arguments.recipe)
    claim = Claim("oialr compare", job_over)
    with stop_requests(loaded) as stop:
        comparison = compare(loaded, folder, own=arguments.own, stop=stop, claim=claim)
    if comparison is None:
        flags = [f"--{flag}" for flag in ("own", "paper") if getattr(arguments, flag)]
        again = ["oialr", "compare", arguments.recipe, *flags, *arguments.settings, "--out", str(folder)]
        show(f"stopped on request; resume with: {shlex.join(again)}")
        return STOPPED
    console().print(_table(comparison.result))
    picture = folder / "compare.png"
    try:
        if is_main():
            plot(comparison, picture)
        show(f"plot: {picture}")
    except ImportError:
        show(MissingExtraError("matplotlib", "plot", purpose="The plot of metric against time"))
    show(folder / "compare.json")
    return FINISHED


def _table(result: dict[str, Any]) -> Table:
    """Both runs and their ratios."""
    dense, oialr = result["dense"], result["oialr"]
    columns = (Column(name, justify="right") for name in ("dense", "OIALR", "OIALR / dense"))
    table = Table("", *columns, title="dense and OIALR", title_justify="left")
    (label, _, form), *others = summary_rows(dense)
    by, accuracy = result["metric_difference"], dense["metric_name"].endswith("accuracy")
    difference = f"{100 * by:+.2f} points" if accuracy else f"{by:+.4f}"
    metric = form.format(oialr["metric"])
    table.add_row(label, form.format(dense["metric"]), metric, difference)
    at = result["dense_metric_at_oialr_wall"]
    known = "not evaluated yet" if at is None else form.format(at)
    table.add_row("  after OIALR's wall time", known, metric, "")
    for label, key, form in others:
        ratio = f"{oialr[key] / dense[key]:.3f}" if dense[key] else ""
        table.add_row(label, form.format(dense[key]), form.format(oialr[key]), ratio)
    return table
