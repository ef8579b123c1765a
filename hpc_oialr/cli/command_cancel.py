"""``oialr cancel``."""

from __future__ import annotations

import argparse
from typing import Any

from hpc_oialr.cli.console import add_command, console, show_warnings
from hpc_oialr.launch.jobs import cancel

EXAMPLES = """  oialr cancel runs/first
  oialr cancel 4711"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    summary = "end the job of a submitted run"
    parser = add_command(commands, "cancel", summary=summary, examples=EXAMPLES)
    parser.add_argument("target", metavar="RUN|JOB", nargs="+", help="folder of a run, or number of a job")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Cancel, and say what."""
    show_warnings()
    for target in arguments.target:
        for job_id in cancel(target):
            console().print(f"cancelled job {job_id}", markup=False)
    return 0
