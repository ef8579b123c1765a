"""End the job of a submitted run."""

from __future__ import annotations

import argparse

from hpc_oialr.cli.console import show
from hpc_oialr.launch.jobs import cancel

EXAMPLES = """  oialr cancel runs/first
  oialr cancel 4711"""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RUN|JOB", nargs="+", help="folder of a run, or number of a job")


def run(arguments: argparse.Namespace) -> None:
    for target in arguments.target:
        for job_id in cancel(target):
            show(f"cancelled job {job_id}")
