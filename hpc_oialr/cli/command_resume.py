"""``oialr resume``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hpc_oialr.cli.command_train import finish
from hpc_oialr.cli.console import add_command, show_warnings
from hpc_oialr.launch.job_main import stop_requests
from hpc_oialr.launch.slurm import job_over

EXAMPLES = """  oialr resume runs/first
  torchrun --nproc-per-node 4 -m hpc_oialr resume runs/first --engine FSDP
  torchrun --nproc-per-node 2 -m hpc_oialr resume runs/first"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    summary = "go on with a run from its last whole checkpoint"
    parser = add_command(commands, "resume", summary=summary, examples=EXAMPLES, takes_settings=True)
    parser.add_argument("folder", metavar="RUN", type=Path, help="folder of the run")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Resume, then print the folder and a table; see :mod:`hpc_oialr.exit_codes` for what it returns."""
    from hpc_oialr.record.owner import Claim
    from hpc_oialr.train.run import load_run, resume

    show_warnings()
    with stop_requests(load_run(arguments.folder, arguments.settings)) as stop:
        claim = Claim("oialr resume", job_over)
        return finish(resume(arguments.folder, settings=arguments.settings, stop=stop, claim=claim))
