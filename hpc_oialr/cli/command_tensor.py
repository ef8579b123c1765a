"""Show which components of a tensor stand out of noise, against theory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_oialr.cli.console import add_force, console, is_main, new_table, show, writing

if TYPE_CHECKING:
    from rich.table import Table

    from hpc_oialr.report.tensors import TensorAnalysis

EXAMPLES = """  oialr tensor measurements.npy
  oialr tensor measurements.npy --noise 0.5 --plot components.pdf
  oialr tensor model.safetensors --name "layer4.*"

A file of numpy.save, or a checkpoint as for oialr analyze, of which every tensor of three modes or more is shown, such as
the kernels of convolutions. The noise is estimated from the median singular value, or given by --noise."""


def add(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("file", metavar="FILE", type=Path, help=".npy, .pt or .safetensors, or a checkpoint's folder")
    option("--name", metavar="PATTERN", nargs="+", default=["*"], help="tensors of a checkpoint; default all")
    option("--level", metavar="P", type=float, default=0.001, help="chance that noise is taken for signal in a mode")
    option("--noise", metavar="SIGMA", type=float, help="standard deviation of an entry's noise; default estimated")
    option("--plot", metavar="FIGURE", type=Path, help="draw one tensor's values, as .png, .pdf or .svg")
    add_force(parser)


def run(arguments: argparse.Namespace) -> None:
    from hpc_oialr.linalg.noise_spectra import MultilinearNoiseEdge
    from hpc_oialr.report.tensors import analyze_tensor, draw, open_tensors, require_one

    if not is_main():
        return
    rule = MultilinearNoiseEdge(level=arguments.level, noise=arguments.noise)
    held = open_tensors(arguments.file, arguments.name)
    names = [require_one(list(held.shapes))] if arguments.plot else list(held.shapes)
    for name in names:
        analysis = analyze_tensor(held.tensor(name), rule, name=name)
        console().print(_table(analysis))
    if arguments.plot:
        from hpc_oialr.report.plots import save

        with writing(arguments.plot):
            save(draw(analysis), arguments.plot, inputs=[arguments.file], force=arguments.force)
        show(arguments.plot)


def _table(analysis: TensorAnalysis) -> Table:
    """A row for each mode; strengths and alignments of the strongest and the weakest value beyond the edge."""
    shape, r = (" x ".join(map(str, sizes)) for sizes in (analysis.shape, analysis.r))
    title = f"{analysis.name}, {shape}: noise {analysis.noise:.3g}, core {r}"
    columns = "size", "edge", "largest", "beyond", "of energy", "strengths", "alignments"
    table = new_table(title, "mode", *columns)
    for number, mode in enumerate(analysis.modes):
        ends = [[], []] if not mode.strengths else [[v[0], v[-1]] for v in (mode.strengths, mode.alignments)]
        cells = (" to ".join(f"{value:.3g}" for value in dict.fromkeys(each)) for each in ends)
        figures = f"{mode.edge:.2f}", f"{float(mode.xi[0]):.2f}", str(len(mode.strengths)), f"{mode.energy:.1%}"
        table.add_row(str(number), str(mode.n), *figures, *cells)
    return table
