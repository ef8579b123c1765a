"""``oialr spectra plot``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hpc_oialr.cli.console import add_command, add_force, console, is_main
from hpc_oialr.errors import OIALRError

EXAMPLES = """  oialr spectra plot runs/first --figure stability --out stability.pdf
  oialr spectra plot runs/first --figure waterfall --layer encoder.0 --width double --out waterfall.svg
  oialr spectra plot runs/demo --figure cost --out cost.png"""
FIGURES = {
    "stability": "of every layer over training",
    "r": "heat map of r by layer and step",
    "waterfall": "singular values of one layer, with the cutoff and the noise edge",
    "share": "metric against the share of trained parameters, of one or several runs",
    "cost": "time and memory against the dense run: both runs, or the folder of oialr compare",
}


def add_plot(actions: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(actions, "plot", summary="draw a figure for a paper", examples=EXAMPLES)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run's folder or its spectra.h5")
    listed = "; ".join(f"{name}: {content}" for name, content in FIGURES.items())
    parser.add_argument(
        "--figure", choices=tuple(FIGURES), default="stability", help=f"{listed}; default stability"
    )
    parser.add_argument("--layer", metavar="NAME", help="of the waterfall; default the first")
    parser.add_argument(
        "--width", choices=("single", "double"), default="single", help="columns of a paper; default single"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="file to write, .png, .pdf or .svg; default FIGURE.png"
    )
    add_force(parser)
    parser.set_defaults(run=plot)


def plot(arguments: argparse.Namespace) -> int:
    """Draw, then print the path."""
    from hpc_oialr.report.plots import figure_of, save
    from hpc_oialr.report.runs import find_runs

    if not is_main():
        return 0
    runs = find_runs(arguments.runs)
    figure = figure_of(arguments.figure, runs, layer=arguments.layer, width=arguments.width)
    path = arguments.out or Path(f"{arguments.figure}.png")
    try:
        save(figure, path, inputs=[run.folder.path for run in runs], force=arguments.force)
    except OSError as error:
        raise OIALRError(f"{path} cannot be written ({error}); name another place by --out.") from error
    finally:
        for run in runs:
            run.close()
    console().print(str(path), markup=False)
    return 0
