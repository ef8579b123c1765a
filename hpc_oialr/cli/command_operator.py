"""Find an operator's leading eigenfunctions or singular functions by networks (NestedLoRA)."""

from __future__ import annotations

import argparse
import json
import time
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hpc_oialr.cli.console import console, is_main, new_table, show, writing
from hpc_oialr.errors import ConfigError, DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

RECIPES = ("harmonic_oscillator", "hydrogen", "matrix")
EXAMPLES = """  oialr operator harmonic_oscillator --out runs/oscillator
  oialr operator hydrogen --steps 40000 --seed 1 --out runs/hydrogen
  oialr operator matrix --matrix A.npy --functions 20 --nesting joint --out runs/matrix
  torchrun --nproc-per-node 4 -m hpc_oialr operator hydrogen --batch 4096 --out runs/large

The folder gets eigenvalues.json, a figure and the functions' weights (functions.safetensors). harmonic_oscillator and
hydrogen are the Schroedinger operators in the plane, matrix is a random one of 400 x 300 or a file of NumPy."""
RESULT, FIGURE, WEIGHTS = "eigenvalues.json", "functions.png", "functions.safetensors"
SETTINGS = {
    "functions": (int, "how many are looked for"),
    "batch": (int, "points of a step, on all ranks together"),
    "steps": (int, "of the optimizer"),
    "lr": (float, "largest learning rate"),
    "nesting": (str, "joint, sequential, or none, which does not order the functions"),
    "seed": (int, "of first weights and points"),
}


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", choices=RECIPES, help=", ".join(RECIPES))
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to write")
    parser.add_argument("--matrix", metavar="FILE.npy", type=Path, help="of the recipe matrix; default a random one")
    for name, (kind, explained) in SETTINGS.items():
        parser.add_argument(f"--{name}", type=kind, metavar="X", help=f"{explained}; default: the recipe's")


def run(arguments: argparse.Namespace) -> None:
    # Whatever is missing or wrong is refused before minutes of training.
    from hpc_oialr.distributed import World
    from hpc_oialr.operators.kernels import MatrixProblem
    from hpc_oialr.operators.recipes import RECIPES
    from hpc_oialr.operators.training import evaluate, train
    from hpc_oialr.outputs import require_absent
    from hpc_oialr.report import eigenfunctions

    require_absent(arguments.out, (RESULT, FIGURE, WEIGHTS), "a solution")
    recipe = RECIPES[arguments.recipe]
    given = {name: value for name in SETTINGS if (value := getattr(arguments, name)) is not None}
    settings = replace(recipe.settings, **given)
    problem = recipe.problem() if arguments.matrix is None else MatrixProblem(_matrix(arguments))
    exact = problem.exact(settings.functions)
    with closing(World.from_environment(device="cpu")) as world:
        with Console(stderr=True, quiet=not is_main()).status("") as status:

            def progress(step: int, loss: float) -> None:
                if step % 50 == 0:
                    status.update(f"step {step} of {settings.steps}, loss {loss:.5g}")

            start = time.perf_counter()
            model = train(problem, settings, group=world.group, progress=progress).model
            seconds = time.perf_counter() - start
        found = problem.spectrum(evaluate(problem, model, settings, group=world.group))
        content: dict[str, Any] = {"recipe": arguments.recipe, "settings": asdict(settings), "processes": world.size}
        content |= {"seconds": seconds, "values": found, "exact": exact}
        if isinstance(problem, MatrixProblem):
            content["alignments"] = problem.alignments(model)
            figure = eigenfunctions.singular_values(found, exact, content["alignments"])
        else:
            titles = [f"{value:.4g}" for value in found]
            figure = eigenfunctions.states(problem.pictures(model).numpy(), titles, problem.extent)
        if world.is_main:
            _write(arguments.out, content, figure, model)
    table = new_table("", "number", "found", "exact", "difference")
    for number, (value, right) in enumerate(zip(found, exact, strict=True), start=1):
        table.add_row(str(number), f"{value:.5g}", f"{right:.5g}", f"{value / right - 1:.2%}")
    console().print(table)
    show(arguments.out)


def _matrix(arguments: argparse.Namespace) -> Tensor:
    """What the file holds, in fp32 or fp64."""
    import numpy as np
    import torch

    if arguments.recipe != "matrix":
        raise ConfigError("--matrix", str(arguments.matrix), f"goes with the recipe matrix, not {arguments.recipe}")
    try:
        A = np.load(arguments.matrix, allow_pickle=False)
        return torch.from_numpy(A.astype(np.float64 if A.dtype == np.float64 else np.float32))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{arguments.matrix} is no file of numbers written by numpy.save ({error}).") from error


def _write(out: Path, content: dict[str, Any], figure: Figure, model: nn.Module) -> None:
    from safetensors.torch import save_file

    from hpc_oialr.outputs import new_folder
    from hpc_oialr.record.environment_report import environment_report
    from hpc_oialr.report.plots import save

    # Other files may be there, none of these names: checked at the start.
    with writing(out), new_folder(out, "oialr operator", force=True) as folder:
        (folder / RESULT).write_text(json.dumps({**content, "environment": environment_report()}, indent=1) + "\n")
        save(figure, folder / FIGURE)
        save_file(model.state_dict(), folder / WEIGHTS)
