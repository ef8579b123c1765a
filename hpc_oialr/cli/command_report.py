"""Write one HTML page of runs, with charts, that works offline."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from hpc_oialr.cli.console import add_out, is_main, show, writing

EXAMPLES = """  oialr report runs/demo
  oialr report runs/first runs/second --out comparison.html"""


def add(parser: argparse.ArgumentParser) -> None:
    explained = "folder of a run or of oialr compare, or a spectra.h5"
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help=explained)
    add_out(parser, "FILE", "page to write; default report.html in the folder that holds all")


def run(arguments: argparse.Namespace) -> None:
    from hpc_oialr.report.page import write_report
    from hpc_oialr.report.runs import find_runs
    from hpc_oialr.report.stragglers import straggler

    if not is_main():
        return
    runs = find_runs(arguments.runs)
    path = arguments.out
    if path is None:
        # In the run's folder, or in the innermost one that holds all.
        common = Path(os.path.commonpath([run.folder.path.resolve() for run in runs]))
        here = Path.cwd()
        path = (common.relative_to(here) if common.is_relative_to(here) else common) / "report.html"
    try:
        with writing(path):
            write_report(runs, path, force=arguments.force)
        late = {run.name: straggler(run.metrics) for run in runs}
    finally:
        for each in runs:
            each.close()
    for name, said in late.items():
        if said is not None:
            show(f"{name}: {said}")
    show(path)
