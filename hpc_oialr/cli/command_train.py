"""``oialr train``."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_oialr.cli.console import add_command, console, show_warnings, summary_table
from hpc_oialr.errors import OIALRError
from hpc_oialr.launch.job_file import note_job
from hpc_oialr.launch.job_main import code_of, stop_requests
from hpc_oialr.launch.slurm import job_over
from hpc_oialr.record.run_folder import RunFolder, default_folder

if TYPE_CHECKING:
    from hpc_oialr.train.load_config import LoadedConfig
    from hpc_oialr.train.run import Result
    from hpc_oialr.train.stopping import StopRequest

EXAMPLES = """  oialr train fashion_mnist_vit
  oialr train fashion_mnist_vit --train.epochs 1 --oialr.delay 100 --out runs/first
  oialr train fashion_mnist_vit --oialr null                       (dense)
  oialr train fashion_mnist_vit --oialr.rule RelativeCutoff --oialr.rule.beta 0.2
  oialr train my_recipe.yaml --print_config
  torchrun --nproc-per-node 2 -m hpc_oialr train fashion_mnist_vit
  srun oialr train fashion_mnist_vit --out runs/first --continue    (in a batch script that may be requeued)

Upon Ctrl-C (twice: at once), a closed terminal, USR2, USR1, TERM, and before the end of its Slurm job, a run writes
a checkpoint and stops. One process works in a run folder at a time.
Exit codes: 0 finished, 75 stopped with a checkpoint, 76 another process was lost, 2 what you can put right.

Every setting and its default: oialr train RECIPE --print_config; what they mean: --help_settings.
Later wins: defaults < recipe < command line."""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands, "train", summary="train a recipe or a YAML file", examples=EXAMPLES, takes_settings=True
    )
    parser.add_argument(
        "recipe", metavar="RECIPE|FILE", help="name of a recipe (see oialr recipes), or a YAML file"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="run folder; default runs/RECIPE-TIME")
    parser.add_argument(
        "--continue",
        dest="go_on",
        action="store_true",
        help="go on with the run in --out, from its start if there is none yet; for batch scripts",
    )
    parser.add_argument(
        "--dense", action="store_true", help="train the dense twin, with the recipe's dense settings"
    )
    parser.add_argument("--print_config", action="store_true", help="print all settings as YAML and stop")
    parser.add_argument("--help_settings", action="store_true", help="explain all settings and stop")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, then print the folder and a table; see :mod:`hpc_oialr.exit_codes` for what it returns."""
    from hpc_oialr.train.load_config import dense_twin, load_config, make_parser

    if arguments.help_settings:
        console().print(make_parser("oialr train RECIPE").format_help(), markup=False)
        return 0
    loaded = load_config(arguments.recipe, arguments.settings)
    loaded = dense_twin(loaded, own=True) if arguments.dense else loaded
    if arguments.print_config:
        console().print(loaded.text, markup=False, end="")
        return 0
    if arguments.go_on and arguments.out is None:
        raise OIALRError("--continue needs --out DIR, the folder of the run to begin or to go on with.")
    show_warnings()
    with stop_requests(loaded) as stop:
        return finish(_train(loaded, arguments, stop))


def _train(loaded: LoadedConfig, arguments: argparse.Namespace, stop: StopRequest) -> Result:
    from hpc_oialr.record.owner import Claim
    from hpc_oialr.train.run import train, train_or_resume

    folder = arguments.out or default_folder(arguments.recipe)
    if not arguments.go_on:
        return train(loaded, folder, stop=stop, claim=Claim("oialr train", job_over))
    claim = Claim("oialr train --continue", job_over, partial(note_job, folder, arguments.recipe))
    return train_or_resume(loaded, folder, stop=stop, claim=claim)


def finish(result: Result) -> int:
    """Print the closing table and the run's folder; the exit code."""
    out = console()
    if result.summary is not None:
        out.print(summary_table(result.summary, _processes(result.summary)))
    else:
        out.print(f"stopped on request; go on with: {RunFolder(result.folder).resume_command}", markup=False)
    out.print(f"run folder: {result.folder}", markup=False)
    return code_of(result)


def _processes(summary: dict[str, Any]) -> str:
    return f"{summary['world_size']} process{'es' * (summary['world_size'] > 1)}, seed {summary['seed']}"
