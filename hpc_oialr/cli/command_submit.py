"""Submit a recipe as a job that is requeued until the run is done."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import fields
from pathlib import Path

from hpc_oialr.cli.console import add_recipe, show
from hpc_oialr.errors import ConfigError, UnknownNameError
from hpc_oialr.launch.request import EXECUTORS, Request
from hpc_oialr.launch.slurm import NoAnswerError, ask
from hpc_oialr.launch.submission import Submission

ORIGIN = "the command line"
EXAMPLES = """  oialr submit vit_b16 --nodes 4 --gpus-per-node 4 --time 04:00:00 --site horeka
  oialr submit fashion_mnist_vit --nodes 2 --train.epochs 1 --out runs/first
  oialr submit fashion_mnist_vit --array seeds=0,1,2 --partition cpu
  oialr submit vit_b16 --nodes 4 --gpus-per-node 4 --dry-run
  oialr submit fashion_mnist_vit --executor local --tasks-per-node 2

A run that is stopped by its time limit, by preemption or by a failing node is requeued and resumes from its last
checkpoint; with --executor local it resumes after its time limit, at most five times.
Other options of sbatch: Slurm's own variables, e.g. SBATCH_RESERVATION. Settings as for oialr train."""

# Option, type, metavar, help; each becomes the parameter of its name.
OPTIONS: tuple[tuple[str, type, str, str], ...] = (
    ("--nodes", int, "N", "number of nodes; default 1"),
    ("--gpus-per-node", str, "N|TYPE:N", "GPUs of each node"),
    ("--tasks-per-node", int, "N", "processes of each node; default one a GPU, or one"),
    ("--cpus-per-task", int, "N", "cores of each process"),
    ("--time", str, "LIMIT", "limit of the job, in Slurm's forms; default 01:00:00"),
    ("--partition", str, "NAME", "as in sbatch"),
    ("--account", str, "NAME", "as in sbatch"),
    ("--qos", str, "NAME", "as in sbatch"),
    ("--constraint", str, "FEATURES", "as in sbatch"),
    ("--exclude", str, "NODES", "as in sbatch"),
    ("--array", str, "seeds=LIST", "one run for each seed, e.g. seeds=0,1,2 or seeds=0-9"),
    ("--signal-s", int, "SECONDS", "how long before the end the processes are told to stop; default 120"),
    ("--max-requeues", int, "N", "a job is not requeued more often; default 20"),
    ("--site", str, "NAME|FILE", "site file of the cluster"),
    ("--executor", str, "NAME", f"{', '.join(EXECUTORS)}; default slurm"),
)


def add(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, help="run folder; default runs/RECIPE-TIME")
    for option, kind, metavar, explanation in OPTIONS:
        parser.add_argument(option, type=kind, metavar=metavar, help=explanation)
    parser.add_argument("--setup", metavar="COMMAND", action="append", help="before the training; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="print the script, and ask sbatch --test-only")


def run(arguments: argparse.Namespace) -> int:
    """Submit, then print each job with its run folder; or print the script, and what Slurm would do with it."""
    try:
        request = request_of(arguments)
        submission = Submission.of(arguments.recipe, arguments.settings, request)
    except ConfigError as error:
        raise error.with_context(origin=error.origin or ORIGIN) from None
    except UnknownNameError as error:
        # A mistyped option looks like a setting, except that names of settings have dots.
        if error.kind != "setting" or "." in error.name:
            raise
        options = [*(option for option, *_ in OPTIONS), "--out", "--setup", "--dry-run"]
        raise UnknownNameError("option or setting", f"--{error.name}", options, origin=ORIGIN) from None
    if arguments.dry_run:
        script = submission.script()
        show(script)
        try:
            answer = ask(["sbatch", "--test-only"], text=script)
        except NoAnswerError as error:
            show(f"# sbatch --test-only: {error}")
            return 0 if "there is no sbatch" in str(error) else 1
        show(f"# {(answer.stderr or answer.stdout).strip()}")
        return 0
    jobs = submission.submit()
    for job, each in zip(jobs, submission.runs, strict=True):
        show(f"job {job.job_id}: {shlex.quote(str(each.folder))}")
    if request.executor == "debug":
        for job in jobs:
            job.results()
    return 0


def request_of(arguments: argparse.Namespace) -> Request:
    """What the options ask of the cluster; raises :class:`ConfigError` that names the command line."""
    given = {**vars(arguments), "folder": arguments.out, "array": _seeds_of(getattr(arguments, "array", None))}
    names = [field.name for field in fields(Request)]
    try:
        return Request(**{name: given[name] for name in names if given.get(name) is not None})
    except ConfigError as error:
        raise error.with_context(origin=error.origin or ORIGIN) from None


def _seeds_of(text: str | None) -> dict[str, list[int]] | None:
    """``seeds=0,4-6`` as an array.

    Examples
    --------
    >>> _seeds_of("seeds=0,4-6")
    {'seeds': [0, 4, 5, 6]}
    """
    if text is None:
        return None
    name, _, values = text.partition("=")
    try:
        bounds = [part.partition("-") for part in values.split(",")]
        ranges = [range(int(first), int(last if dash else first) + 1) for first, dash, last in bounds]
    except ValueError:
        rule = "must be seeds=LIST, with numbers and ranges"
        raise ConfigError("array", text, rule, fix="E.g. seeds=0,1,2 or seeds=0-9.") from None
    return {name: [seed for each in ranges for seed in each]}
