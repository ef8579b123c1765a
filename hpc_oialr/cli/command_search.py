"""Search for better settings of a recipe: many trials as jobs, poor ones stopped early."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
from pathlib import Path

from hpc_oialr.cli.command_submit import OPTIONS, ORIGIN, request_of
from hpc_oialr.cli.console import add_recipe, console, new_table, show
from hpc_oialr.errors import ConfigError, MissingExtraError, UnknownNameError
from hpc_oialr.exit_codes import FINISHED, STOPPED
from hpc_oialr.search.objectives import OBJECTIVES

EXAMPLES = """  oialr search vit_b16 --trials 64 --parallel 8 --gpus-per-node 4 --time 04:00:00 --site horeka
  oialr search fashion_mnist_vit --trials 12 --parallel 2 --executor local --train.epochs 1
  oialr search my_recipe.yaml --space my_space.yaml --objectives metric,wall_s,trainable_params

The first trial is the recipe itself. Trials are compared by the metric on validation data at their end. With one
objective those that fall behind the median at an evaluation are stopped early; with several all come to their end, and
the Pareto front is written and plotted. The same command continues a search that was stopped or killed.
In the folder: trials.csv; best.yaml, a recipe; pareto.png; journal.log, an Optuna journal; trial_0000, ..., the runs.
Settings as for oialr train are those of every trial."""


def add(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    option = parser.add_argument
    option("--space", metavar="FILE", help="what is searched: a YAML file; default the package's for this recipe")
    option("--trials", metavar="N", type=int, default=64, help="trials in all; default 64")
    option("--parallel", metavar="N", type=int, default=8, help="trials that run at a time; default 8")
    explained = f"one or several of {', '.join(OBJECTIVES)}; default metric"
    option("--objectives", metavar="NAMES", default="metric", help=explained)
    option("--no-pruning", action="store_true", help="let every trial come to its end")
    option("--out", metavar="DIR", type=Path, help="folder of the search; default runs/search-RECIPE")
    for name, kind, metavar, help_text in OPTIONS:
        if name != "--array":
            option(name, type=kind, metavar=metavar, help=help_text)
    option("--setup", metavar="COMMAND", action="append", help="before the training; repeatable")


def run(arguments: argparse.Namespace) -> int:
    """Search, then print all trials, what was found, and the command and files of the best one."""
    from hpc_oialr.distributed.signals import NAMES, catch_signals
    from hpc_oialr.launch.slurm import job_over
    from hpc_oialr.record.owner import Claim
    from hpc_oialr.search.results import findings
    from hpc_oialr.search.runs import TrialRuns
    from hpc_oialr.search.search import Search
    from hpc_oialr.search.space import as_arguments, check_space, read_space
    from hpc_oialr.search.study import StudySettings, require_optuna

    objectives = _checked(arguments)
    request = request_of(arguments)
    require_optuna()
    space = read_space(arguments.space or Path(arguments.recipe).stem)
    loaded = check_space(arguments.recipe, space, arguments.settings)
    folder = arguments.out or Path("runs") / f"search-{Path(arguments.recipe).stem}"
    settings = [*as_arguments(space.fixed), *arguments.settings]
    runs = TrialRuns(arguments.recipe, settings, request, folder.absolute(), arguments.parallel)
    runs.submission(0, {})  # what is wrong with the request is said before anything begins
    train, task = loaded.config.train, loaded.config.task
    study_settings = StudySettings(
        objectives=objectives,
        higher_is_better=task.higher_is_better,
        evaluations=train.evaluations,
        parallel=arguments.parallel,
        seed=train.seed,
        prune=not arguments.no_pruning,
    )
    search = Search(loaded, space, study_settings, runs, arguments.trials, tell=show)
    with catch_signals(("INT", *NAMES), _interrupted) as flag:
        study = search.run(stopped=lambda: flag.name, claim=Claim("oialr search", job_over))
    if study is None:
        show(f"continue with: {shlex.join(['oialr', *arguments.words])}")
        return STOPPED
    found = findings(study, runs, objectives, task.metric)
    table = new_table(f"{len(found.rows)} trials", "trial", "state", *objectives)
    for row in found.rows:
        values = ("",) * len(objectives) if row.values is None else (f"{value:.5g}" for value in row.values)
        table.add_row(row.name, f"{row.state}{' *' if row.best else ''}", *values)
    console().print(table)
    show("* best" if len(objectives) == 1 else "* on the Pareto front")
    show(found.verdict())
    for path in found.write():
        show(path)
    if len(objectives) > 1:
        try:
            found.plot(folder / "pareto.png")
            show(folder / "pareto.png")
        except ImportError:
            show(MissingExtraError("matplotlib", "plot", purpose="The plot of the Pareto front"))
    if (best := found.best) is not None:
        show(found.command(best))
    return FINISHED


def _checked(arguments: argparse.Namespace) -> list[str]:
    """The objectives; raises :class:`ConfigError` or :class:`UnknownNameError` for options that make no sense."""
    objectives: list[str] = arguments.objectives.split(",")
    for name in objectives:
        if name not in OBJECTIVES:
            raise UnknownNameError("objective", name, OBJECTIVES, origin=ORIGIN)
    if len(set(objectives)) < len(objectives):
        raise ConfigError("objectives", arguments.objectives, "must be different ones", origin=ORIGIN)
    for name in ("trials", "parallel"):
        if getattr(arguments, name) < 1:
            raise ConfigError(name, getattr(arguments, name), "must be at least 1", origin=ORIGIN)
    if arguments.executor == "debug":
        rule = "must be slurm or local: trials run beside each other"
        raise ConfigError("executor", "debug", rule, origin=ORIGIN)
    if arguments.executor != "local" and shutil.which("sbatch") is None:
        rule = "needs sbatch, which is not here"
        raise ConfigError("executor", "slurm", rule, fix="On a machine without Slurm: --executor local.")
    return objectives


def _interrupted() -> None:
    os.write(2, b"\noialr: the search stops; the same command continues it\n")
