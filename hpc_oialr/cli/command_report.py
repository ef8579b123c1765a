"""``oialr report``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_oialr.cli.console import add_command, add_force, console, is_main
from hpc_oialr.errors import OIALRError

if TYPE_CHECKING:
    from hpc_oialr.report.runs import Run

EXAMPLES = """  oialr report runs/demo
  oialr report runs/first runs/second --out comparison.html"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    summary = "write one HTML page of runs, with charts, that works offline"
    parser = add_command(commands, "report", summary=summary, examples=EXAMPLES)
    parser.add_argument(
        "runs",
        metavar="RUN",
        type=Path,
        nargs="+",
        help="folder of a run or of oialr compare, or a spectra.h5",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="page to write; default report.html in the folder that holds all",
    )
    add_force(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the page, then print its path."""
    from hpc_oialr.report.page import write_report
    from hpc_oialr.report.runs import find_runs

    if not is_main():
        return 0
    runs = find_runs(arguments.runs)
    path = arguments.out or default_page(runs)
    try:
        write_report(runs, path, force=arguments.force)
    except OSError as error:
        if isinstance(error, OIALRError):
            raise
        raise OIALRError(f"{path} cannot be written ({error}); name another place by --out.") from error
    finally:
        for each in runs:
            each.close()
    console().print(str(path), markup=False)
    return 0


def default_page(runs: Sequence[Run]) -> Path:
    """``report.html`` in the run's folder, or in the innermost one that holds all."""
    folders = [str(run.folder.path.resolve()) for run in runs]
    common, here = Path(os.path.commonpath(folders)), Path.cwd()
    return (common.relative_to(here) if common.is_relative_to(here) else common) / "report.html"
