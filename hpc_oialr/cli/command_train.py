"""Train a recipe or a YAML file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Column, Table

from hpc_oialr.cli.console import add_recipe, console, show
from hpc_oialr.errors import OIALRError
from hpc_oialr.exit_codes import FINISHED, STOPPED
from hpc_oialr.launch.job_file import note_job
from hpc_oialr.launch.job_main import stop_requests
from hpc_oialr.launch.slurm import job_over
from hpc_oialr.record.run_folder import RunFolder, default_folder

if TYPE_CHECKING:
    from hpc_oialr.train.load_config import LoadedConfig
    from hpc_oialr.train.run import Result

EXAMPLES = """  oialr train fashion_mnist_vit
  oialr train fashion_mnist_vit --train.epochs 1 --oialr.delay 100 --out runs/first
  oialr train fashion_mnist_vit --oialr null                       (dense)
  oialr train fashion_mnist_vit --oialr.rule RelativeCutoff --oialr.rule.beta 0.2
  oialr train my_recipe.yaml --print_config
  torchrun --nproc-per-node 2 -m hpc_oialr train fashion_mnist_vit
  srun oialr train fashion_mnist_vit --out runs/first --continue    (in a batch script that may be requeued)

Upon Ctrl-C (twice: at once), a closed terminal, USR2, USR1, TERM, and before the end of its Slurm job, a run writes
a checkpoint and stops. One process works in a run folder at a time.
Exit codes: 0 finished, 75 stopped with a checkpoint, 76 another rank was lost, 2 an error that you can fix.

Every setting and its default: oialr train RECIPE --print_config; what they mean: --help_settings.
Later wins: defaults < recipe < command line."""


def add(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    option = parser.add_argument
    option("--out", metavar="DIR", type=Path, help="run folder; default runs/RECIPE-TIME")
    option("--continue", dest="go_on", action="store_true", help="resume the run in --out, or start it")
    option("--dense", action="store_true", help="train the dense baseline, with the recipe's dense settings")
    option("--paper", action="store_true", help="train the published method, with the recipe's paper settings")
    option("--tracker", metavar="NAME", help="also send all numbers to comet, mlflow, tensorboard, trackio or wandb")
    option("--print_config", action="store_true", help="print all settings as YAML and stop")
    option("--help_settings", action="store_true", help="explain all settings and stop")


def run(arguments: argparse.Namespace) -> int:
    """Train, then print the folder and a table; see :mod:`hpc_oialr.exit_codes` for what it returns."""
    loaded = load(arguments, arguments.settings)
    return FINISHED if loaded is None else finish(start(arguments, loaded))


def load(arguments: argparse.Namespace, settings: Sequence[str]) -> LoadedConfig | None:
    """The settings of the run; None if they were only to be printed or explained, which is done."""
    from hpc_oialr.train.load_config import dense_twin, load_config, make_parser, paper_variant

    if arguments.help_settings:
        show(make_parser("oialr train RECIPE").format_help())
        return None
    tracker = [] if arguments.tracker is None else ["--record.tracker", arguments.tracker]
    loaded = load_config(arguments.recipe, [*settings, *tracker])
    loaded = paper_variant(loaded) if arguments.paper else loaded
    loaded = dense_twin(loaded, own=True) if arguments.dense else loaded
    if arguments.print_config:
        show(loaded.text, end="")
        return None
    if arguments.go_on and arguments.out is None:
        raise OIALRError("--continue needs --out DIR, the folder of the run to start or to resume.")
    return loaded


def start(arguments: argparse.Namespace, loaded: LoadedConfig) -> Result:
    """Train, or with ``--continue`` go on."""
    from hpc_oialr.record.owner import Claim
    from hpc_oialr.train.run import train, train_or_resume

    folder = arguments.out or default_folder(arguments.recipe)
    with stop_requests(loaded) as stop:
        if not arguments.go_on:
            return train(loaded, folder, stop=stop, claim=Claim("oialr train", job_over))
        claim = Claim("oialr train --continue", job_over, partial(note_job, folder, arguments.recipe))
        return train_or_resume(loaded, folder, stop=stop, claim=claim)


def finish(result: Result) -> int:
    """Print the closing table and the run's folder; the exit code."""
    if (summary := result.summary) is not None:
        title = f"{summary['world_size']} process{'es' * (summary['world_size'] > 1)}, seed {summary['seed']}"
        table = Table("", Column("", justify="right"), title=title, title_justify="left", show_header=False)
        for label, key, form in summary_rows(summary):
            table.add_row(label, form.format(summary[key]))
        console().print(table)
    else:
        show(f"stopped on request; resume with: {RunFolder(result.folder).resume_command}")
    show(f"run folder: {result.folder}")
    return STOPPED if summary is None else FINISHED


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Label, key and number format of what a table shows of a summary."""
    form = "{:.2%}" if summary["metric_name"].endswith("accuracy") else "{:.4f}"
    return [
        (summary["metric_name"].replace("_", " "), "metric", form),
        ("wall time (s)", "wall_s", "{:.1f}"),
        ("of which updates (s)", "update_wall_s", "{:.2f}"),
        ("trained parameters", "trainable_params", "{:,}"),
        ("trained parameters, dense", "dense_trainable_params", "{:,}"),
        ("peak memory (GiB)", "peak_memory_gib", "{:.3f}"),
        ("steps", "steps", "{:,}"),
    ]
