"""List submitted runs: state, step, time to the end, last line of an error."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from hpc_oialr.cli.console import console, show
from hpc_oialr.launch.jobs import JobRow, find_runs, rows_of
from hpc_oialr.launch.slurm import Slurm
from hpc_oialr.record.progress import clock_time

EXAMPLES = """  oialr jobs
  oialr jobs --all
  oialr jobs runs/first runs/second"""

COLUMNS = "job", "run", "state", "requeues", "step", "ETA / time left", "trained", "mean r", "loss", "metric"
UNKNOWN = "-"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="*", help="folders; default all under runs/")
    parser.add_argument("--all", action="store_true", help="completed runs too")


def run(arguments: argparse.Namespace) -> None:
    """Print a table, and a line for each error."""
    found = rows_of(find_runs(arguments.runs), Slurm())
    every = arguments.all or arguments.runs
    rows = [row for row in found if every or row.state.state != "COMPLETED" or row.error]
    if rows:
        table = Table(*COLUMNS, box=SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            table.add_row(*(Text(cell) for cell in _cells(row)))
        console().print(table)
    for row in rows:
        if row.error:
            show(f"{row.folder.path}: {row.error}")
    hidden = len(found) - len(rows)
    if hidden:
        show(f"{hidden} completed: oialr jobs --all")
    elif not rows:
        show("no submitted runs")


def _cells(row: JobRow) -> list[str]:
    """One row of the table; a dash for what is not known."""

    def number(value: float | None, form: str) -> str:
        return UNKNOWN if value is None else format(value, form)

    state = row.state
    requeues = UNKNOWN if state.requeues is None else f"{state.requeues} of {row.job.max_requeues}"
    step = UNKNOWN if row.step is None else f"{row.step} of {row.total_steps}"
    metric = f"{row.metric_name} {number(row.metric, '.4f')}" if row.metric_name else UNKNOWN
    return [
        row.job.job_id,
        str(row.folder.path),
        f"{state.state} ({state.reason})" if state.state == "PENDING" and state.reason else state.state,
        requeues,
        step,
        _times(row),
        number(row.trained_share, ".1%"),
        number(row.r_mean, ".1f"),
        number(row.loss, ".4f"),
        metric,
    ]


def _times(row: JobRow) -> str:
    """Time to the run's end and to the job's; says so if the run will need another job."""
    eta, left = row.eta_s, row.left_s
    if eta is None and left is None:
        return UNKNOWN
    both = " / ".join(UNKNOWN if time is None else clock_time(max(0.0, time)) for time in (eta, left))
    return f"{both}, resumes after a requeue" if eta is not None and left is not None and eta > left else both
