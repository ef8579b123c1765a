"""Show what a run's process printed."""

from __future__ import annotations

import argparse
import sys

from hpc_oialr.cli.console import add_run
from hpc_oialr.launch.job_file import follow, log_files, read_job
from hpc_oialr.launch.jobs import watch_job
from hpc_oialr.record.run_folder import RunFolder

EXAMPLES = """  oialr logs runs/first
  oialr logs runs/first -f
  oialr logs runs/first --process 3"""


def add(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="until the run or its job is over")
    parser.add_argument("--process", type=int, default=0, metavar="N", help="which process; default 0")


def run(arguments: argparse.Namespace) -> None:
    """Write the log to standard output as it is."""
    folder = RunFolder(arguments.folder)
    files = log_files(folder, arguments.process)
    over = watch_job(read_job(folder)) if arguments.follow and folder.job.exists() else lambda: False
    for text in follow(files, lambda: not arguments.follow or folder.finished or over()):
        sys.stdout.write(text)
        sys.stdout.flush()
