"""``oialr compare``."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from hpc_oialr.cli.console import add_command, console, rows, show_warnings
from hpc_oialr.distributed import launch_info
from hpc_oialr.errors import MissingExtraError
from hpc_oialr.exit_codes import FINISHED, STOPPED
from hpc_oialr.launch.job_main import stop_requests
from hpc_oialr.launch.slurm import job_over
from hpc_oialr.record.run_folder import default_folder

if TYPE_CHECKING:
    from hpc_oialr.compare import Comparison

EXAMPLES = """  oialr compare fashion_mnist_vit --own
  oialr compare fashion_mnist_vit --train.epochs 1 --out runs/equal_steps
  oialr compare fashion_mnist_vit --own --dense.train.epochs 3"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    summary = "train a recipe and its dense twin, same seed and data order, and compare them"
    parser = add_command(commands, "compare", summary=summary, examples=EXAMPLES, takes_settings=True)
    parser.add_argument(
        "recipe", metavar="RECIPE|FILE", help="name of a recipe (see oialr recipes), or a YAML file"
    )
    parser.add_argument(
        "--own",
        action="store_true",
        help="the dense twin takes the recipe's dense settings, not the same steps",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="folder of both runs; default runs/RECIPE-TIME"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train both, then print a table, the plot's path and, last, the path of ``compare.json``."""
    from hpc_oialr.compare import compare
    from hpc_oialr.record.owner import Claim
    from hpc_oialr.train.load_config import load_config

    show_warnings()
    loaded = load_config(arguments.recipe, arguments.settings)
    folder = arguments.out or default_folder(arguments.recipe)
    with stop_requests(loaded) as stop:
        claim = Claim("oialr compare", job_over)
        comparison = compare(loaded, folder, own=arguments.own, stop=stop, claim=claim)
    if comparison is None:
        own = ["--own"] if arguments.own else []
        again = ["oialr", "compare", arguments.recipe, *own, *arguments.settings, "--out", str(folder)]
        console().print(f"stopped on request; go on with: {shlex.join(again)}", markup=False)
        return STOPPED
    show(comparison)
    return FINISHED


def show(comparison: Comparison) -> None:
    """Table, plot, paths."""
    out = console()
    out.print(comparison_table(comparison.result))
    out.print(_draw(comparison), markup=False)
    out.print(str(comparison.folder / "compare.json"), markup=False)


def comparison_table(result: dict[str, Any]) -> Table:
    """Both runs and their ratios."""
    dense, oialr = result["dense"], result["oialr"]
    table = Table("", title="dense and OIALR", title_justify="left")
    for name in ("dense", "OIALR", "OIALR / dense"):
        table.add_column(name, justify="right")
    lines = rows(dense)
    form = lines[0][2]
    table.add_row(
        lines[0][0], form.format(dense["metric"]), form.format(oialr["metric"]), _difference(result)
    )
    at = result["dense_metric_at_oialr_wall"]
    known = "not evaluated yet" if at is None else form.format(at)
    table.add_row("  after OIALR's wall time", known, form.format(oialr["metric"]), "")
    for label, key, form in lines[1:]:
        ratio = f"{oialr[key] / dense[key]:.3f}" if dense[key] else ""
        table.add_row(label, form.format(dense[key]), form.format(oialr[key]), ratio)
    return table


def _difference(result: dict[str, Any]) -> str:
    value = result["metric_difference"]
    if result["dense"]["metric_name"].endswith("accuracy"):
        return f"{100 * value:+.2f} points"
    return f"{value:+.4f}"


def _draw(comparison: Comparison) -> str:
    """Draw the plot; where it is, or how to get it."""
    from hpc_oialr.compare import plot

    path = comparison.folder / "compare.png"
    try:
        if launch_info().rank == 0:
            plot(comparison, path)
    except ImportError:
        return str(MissingExtraError("matplotlib", "plot", purpose="The plot of metric against time"))
    return f"plot: {path}"
