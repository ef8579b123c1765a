"""Leading functions of operators by NestedLoRA, over nestings and seeds; the streamed SVD beside the randomized one.

A row for each training: of a random 400 x 300 matrix (another one for each seed), of the harmonic oscillator and of the
hydrogen atom in the plane. `worst_value` is the largest relative error of the values that are wanted, each at its own
place of the order; `worst_alignment` the smallest |cosine| of a function with the singular vector of its number (matrix).
`seconds` are of one thread, with `--workers` trainings beside each other; `cpu_seconds` are what it computed, of which a
machine that is at work on something else gives less than one a second.

`distributed`: largest difference of a minibatch's gradient on several processes over gloo to one process's, relative to
its norm. `streaming`: error and time of one pass over row blocks, of torch.svd_lowrank on the whole matrix in memory, and
of LAPACK, on a spectrum that falls by 1 % from value to value; `error` is ||A - A V Vh||_F over the best possible.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Row, arguments, earlier, finish, print_table, time_ratios
from benchmarks.processes import on_processes
from hpc_oialr.distributed import World
from hpc_oialr.linalg.communicator import communicator
from hpc_oialr.linalg.streaming_svd import streaming_svd
from hpc_oialr.operators.kernels import MatrixProblem
from hpc_oialr.operators.nested_lora import nested_lora, sum_gradients
from hpc_oialr.operators.recipes import RECIPES, random_matrix
from hpc_oialr.operators.training import Problem, evaluate, generator_of, train

# Recipe, nesting, whether gradients are balanced.
KINDS = [
    ("harmonic_oscillator", "sequential", False),
    ("hydrogen", "sequential", True),
    ("hydrogen", "sequential", False),
]
KINDS += [("matrix", nesting, False) for nesting in ("sequential", "joint", "none")]
JOBS = [(*kind, seed) for seed in range(3) for kind in KINDS]


def problem_of(name: str, seed: int) -> Problem:
    """The recipe's; another matrix for each seed."""
    return MatrixProblem(random_matrix(seed=seed)) if name == "matrix" else RECIPES[name].problem()


def solve(job: tuple[str, str, bool, int]) -> Row:
    """One training."""
    torch.set_num_threads(1)
    name, nesting, balance, seed = job
    problem, settings = problem_of(name, seed), RECIPES[name].settings
    settings = replace(settings, nesting=nesting, balance=balance, seed=seed)
    start, cpu = time.perf_counter(), time.process_time()
    model = train(problem, settings).model
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    found, exact = problem.spectrum(evaluate(problem, model, settings)), problem.exact(settings.functions)
    errors = [value / right - 1 for value, right in zip(found, exact, strict=True)]
    aligned = problem.alignments(model) if isinstance(problem, MatrixProblem) else None
    return {
        "problem": name,
        "nesting": nesting,
        "balance": balance,
        "seed": seed,
        "functions": settings.functions,
        "batch": settings.batch,
        "steps": settings.steps,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "worst_value": max(map(abs, errors)),
        "worst_alignment": min(aligned) if aligned else None,
        "values": found,
        "exact": exact,
        "alignments": aligned,
    }


def gradients() -> Row:
    """Of one minibatch of each recipe, by all processes of the world."""
    world = World.from_environment(device="cpu")
    comm, found = communicator(world.group), {}
    for name, recipe in RECIPES.items():
        problem, settings = recipe.problem(), recipe.settings
        torch.manual_seed(0)
        model = problem.functions(settings.functions)
        sides = problem.sides(model, settings.batch, generator_of(0, 0), comm)
        nested_lora(sides, nesting=settings.nesting, balance=settings.balance, group=comm).backward()
        sum_gradients(list(model.parameters()), comm)
        found[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return found


def distributed(sizes: tuple[int, ...] = (2, 4)) -> list[Row]:
    """Differences to one process."""
    (alone,) = on_processes(1, gradients)
    rows = []
    for size in sizes:
        found = on_processes(size, gradients)
        for name, right in alone.items():
            difference = max(float((mine[name] - right).norm() / right.norm()) for mine in found)
            rows.append({"problem": name, "processes": size, "difference": difference})
    return rows


def streaming(m: int, n: int, r: int, block: int, repeats: int) -> list[Row]:
    """Errors and times, one thread."""
    torch.set_num_threads(1)
    A = torch.randn(m, n, generator=torch.Generator().manual_seed(0)) * 0.99 ** torch.arange(n)
    torch.manual_seed(0)
    methods: dict[str, Callable[[], Tensor]] = {
        "LAPACK": lambda: torch.linalg.svd(A, full_matrices=False)[2][:r].mT,
        "streaming_svd": lambda: streaming_svd(A.split(block), r=r).Vh.mT,
        "svd_lowrank, niter=2": lambda: torch.svd_lowrank(A, q=r + 10, niter=2)[2][:, :r],
        "svd_lowrank, niter=0": lambda: torch.svd_lowrank(A, q=r + 10, niter=0)[2][:, :r],
    }
    found = {name: call() for name, call in methods.items()}
    ratios, seconds = time_ratios(methods, "streaming_svd", repeats=repeats, warmup=0)
    error = {name: float((A - A @ V @ V.mT).norm()) for name, V in found.items()}
    return [
        {
            "method": name,
            **{"m": m, "n": n, "r": r},
            "error": error[name] / error["LAPACK"],
            "time": ratios[name],
            "seconds": seconds * ratios[name],
            "rows_held": 2 * (r + 10 + max(block, r + 10)) if name == "streaming_svd" else m,
            "passes": {"streaming_svd": 1, "svd_lowrank, niter=2": 6, "svd_lowrank, niter=0": 2}.get(name),
        }
        for name in methods
    ]


def main() -> None:
    """Run what an earlier result lacks."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--workers", type=int, default=2, help="trainings beside each other")
    parser.add_argument("--shape", type=int, nargs=2, default=(40_000, 1000), help="of the streamed matrix")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of its timing")
    options = parser.parse_args()
    extra: dict[str, Any] = {"distributed": distributed()}
    extra["streaming"] = streaming(*options.shape, r=32, block=64, repeats=options.repeats)
    for rows in extra.values():
        print_table(rows)
    done = {(row["problem"], row["nesting"], row["balance"], row["seed"]): row for row in earlier(options.out)}
    with get_context("spawn").Pool(options.workers) as pool:
        for job, row in zip(left := [job for job in JOBS if job not in done], pool.imap(solve, left), strict=True):
            done[job] = row
            finish([done[job] for job in JOBS if job in done], options.out, workers=options.workers, **extra)


if __name__ == "__main__":
    main()
