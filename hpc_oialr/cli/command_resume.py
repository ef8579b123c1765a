"""Resume a run from its last complete checkpoint."""

from __future__ import annotations

import argparse

from hpc_oialr.cli.command_train import finish
from hpc_oialr.cli.console import add_run
from hpc_oialr.launch.job_main import stop_requests
from hpc_oialr.launch.slurm import job_over

EXAMPLES = """  oialr resume runs/first
  torchrun --nproc-per-node 4 -m hpc_oialr resume runs/first --engine FSDP
  torchrun --nproc-per-node 2 -m hpc_oialr resume runs/first"""


def add(parser: argparse.ArgumentParser) -> None:
    add_run(parser)


def run(arguments: argparse.Namespace) -> int:
    from hpc_oialr.record.owner import Claim
    from hpc_oialr.train.run import load_run, resume

    with stop_requests(load_run(arguments.folder, arguments.settings)) as stop:
        claim = Claim("oialr resume", job_over)
        return finish(resume(arguments.folder, settings=arguments.settings, stop=stop, claim=claim))
