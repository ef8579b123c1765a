"""Check what would make a run fail here, and how to fix it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from hpc_oialr.cli.console import console

EXAMPLES = """  oialr doctor                                     (on a laptop, or a login node)
  oialr doctor --partition gpu --folder /scratch/me/runs --need-gib 50
  oialr doctor --site horeka
  srun --nodes=2 --ntasks-per-node=4 oialr doctor     (every process looks at itself)

Exit code 0: no problems; 1: problems, each with its fix."""
_MOST_NODES = 4
_COLOURS = {"ok": "green", "note": "yellow", "problem": "bold red"}


def add(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--site", metavar="NAME|FILE", help="site file of the cluster, sourced first")
    option("--folder", metavar="DIR", type=Path, help="run folder; default the site's, or runs")
    option("--partition", metavar="NAME", help="partition that jobs will ask for")
    option("--need-gib", metavar="GIB", type=float, default=5.0, help="space the run needs; default 5")
    option("--timeout-s", metavar="S", type=float, default=10.0, help="for a program of a check; default 10")
    option("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run all checks, then print a table and a fix for each problem."""
    from hpc_oialr.doctor.checks import aggregate, run_checks
    from hpc_oialr.doctor.context import CheckContext

    names = ("folder", "partition", "need_gib", "timeout_s")
    options = {name: getattr(arguments, name) for name in names}
    context, findings = CheckContext.at_site(arguments.site, **options)
    summary = aggregate(context, [*findings, *run_checks(context)])
    if summary is None:
        return 0
    found, processes = summary
    problems = sum(finding.state == "problem" for finding in found)
    # Where processes cannot meet, each prints.
    out = console(every_rank=True)
    code = 1 if problems else 0
    if arguments.json:
        listed = [vars(finding) for finding in found]
        content = {"node": context.node, "processes": processes, "problems": problems}
        out.print(json.dumps({**content, "findings": listed}, indent=2), markup=False)
        return code
    title = context.node if processes == 1 else f"{processes} processes, seen from {context.node}"
    table = Table("check", "", "found", title=title, title_justify="left")
    for finding in found:
        state = Text(finding.state, style=_COLOURS[finding.state])
        where = f" [{_names(finding.nodes)}]" if finding.nodes else ""
        table.add_row(finding.name, state, Text(finding.found + where))
    out.print(table)
    for wanted in ("problem", "note"):
        for finding in found:
            if finding.state == wanted and finding.fix:
                out.print(f"{wanted:8} {finding.name}: {finding.fix}", markup=False)
    if not problems:
        out.print("no problems", markup=False)
    return code


def _names(nodes: Sequence[str]) -> str:
    """The first few nodes.

    >>> _names(("n0", "n1", "n2", "n3", "n4", "n5"))
    'n0, n1, n2, n3 and 2 more'
    """
    more = f" and {len(nodes) - _MOST_NODES} more" if len(nodes) > _MOST_NODES else ""
    return ", ".join(nodes[:_MOST_NODES]) + more
