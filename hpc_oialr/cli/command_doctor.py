"""``oialr doctor``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hpc_oialr.cli.console import add_command, console

EXAMPLES = """  oialr doctor                                     (on a laptop, or a login node)
  oialr doctor --partition gpu --account my-project --folder /scratch/me/runs --need-gib 50
  oialr doctor --site horeka
  srun --nodes=2 --ntasks-per-node=4 oialr doctor     (every process looks at itself)

Exit code 0: no problems; 1: problems, each with the line that puts it right."""
_COLOURS = {"ok": "green", "note": "yellow", "problem": "bold red"}


def add(commands: Any) -> None:
    """Add the command to the parser."""
    summary = "find out what would make a run fail here, and how to put it right"
    parser = add_command(commands, "doctor", summary=summary, examples=EXAMPLES)
    parser.add_argument("--site", metavar="NAME|FILE", help="site file of the cluster, sourced first")
    parser.add_argument("--folder", metavar="DIR", type=Path, help="run folder; default the site's, or runs")
    parser.add_argument("--partition", metavar="NAME", help="partition that jobs will ask for")
    parser.add_argument("--account", metavar="NAME", help="account that jobs will ask for")
    parser.add_argument(
        "--need-gib", metavar="GIB", type=float, default=5.0, help="space the run needs; default 5"
    )
    parser.add_argument(
        "--timeout-s", metavar="S", type=float, default=10.0, help="what takes longer hangs; default 10"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run all checks, then print a table and a fix for each problem."""
    from hpc_oialr.doctor.checks import aggregate, run_checks
    from hpc_oialr.doctor.context import CheckContext

    context, findings = CheckContext.at_site(
        arguments.site,
        folder=arguments.folder,
        partition=arguments.partition,
        account=arguments.account,
        need_gib=arguments.need_gib,
        timeout_s=arguments.timeout_s,
    )
    summary = aggregate(context, [*findings, *run_checks(context)])
    if not summary.shown:
        return 0
    # Where processes cannot meet, each prints.
    out = console(of_every_process=True)
    if arguments.json:
        out.print(as_json(context.node, summary), markup=False)
    else:
        show(out, context.node, summary)
    return 1 if summary.problems else 0


def as_json(node: str, summary: Any) -> str:
    """For machines."""
    rows = [{**vars(row.finding), "nodes": list(row.nodes)} for row in summary.rows]
    return json.dumps(
        {
            "node": node,
            "processes": summary.processes,
            "problems": len(summary.problems),
            "findings": rows,
        },
        indent=2,
    )


def show(out: Console, node: str, summary: Any) -> None:
    """The table, then one line for each problem."""
    title = node if summary.processes == 1 else f"{summary.processes} processes, seen from {node}"
    table = Table(title=title, title_justify="left")
    for column in ("check", "", "found"):
        table.add_column(column)
    for row in summary.rows:
        finding = row.finding
        state = Text(finding.state, style=_COLOURS[finding.state])
        table.add_row(finding.name, state, Text(f"{finding.found}{f' [{row.where}]' if row.nodes else ''}"))
    out.print(table)
    for wanted in ("problem", "note"):
        for finding in (row.finding for row in summary.rows if row.finding.state == wanted):
            if finding.fix:
                out.print(f"{wanted:8} {finding.name}: {finding.fix}", markup=False)
    if not summary.problems:
        out.print("no problems", markup=False)
