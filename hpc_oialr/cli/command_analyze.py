"""Write the spectra of a training's checkpoints, made here or elsewhere."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from hpc_oialr.cli.console import add_force, is_main, show, writing
from hpc_oialr.record.progress import clock_time

EXAMPLES = """  oialr analyze checkpoint-500 checkpoint-1000 checkpoint-1500 --out spectra.h5
  oialr analyze epoch*.pt --include "encoder.*" --out encoder.h5
  oialr analyze first.safetensors last.safetensors --steps 0 9000 --out two.h5
  torchrun --nproc-per-node 4 -m hpc_oialr analyze runs/dense/checkpoints/step_* --out spectra.h5
  oialr spectra plot spectra.h5          (then, as for a run; also show, export, and oialr report)

A checkpoint: a safetensors file, a torch file with a state dict (never one that would run code), a folder as
transformers writes it, or a run's checkpoints/step_NUMBER, all of one dense model."""


def add(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("checkpoints", metavar="CHECKPOINT", type=Path, nargs="+", help="file or folder")
    option("--out", metavar="FILE.h5", type=Path, required=True, help="file to write")
    explained = "of the checkpoints, in the order given; default the last numbers in their names"
    option("--steps", metavar="N", type=int, nargs="+", help=explained)
    explained = "shell patterns of layers that are measured; default all"
    option("--include", metavar="PATTERN", nargs="+", help=explained)
    explained = "of those that are not; default tables of embeddings"
    option("--exclude", metavar="PATTERN", nargs="+", help=explained)
    option("--max-aspect", metavar="X", type=float, help="leave out matrices longer than that; default 10")
    option("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add_force(parser)


def run(arguments: argparse.Namespace) -> None:
    from hpc_oialr.distributed import World
    from hpc_oialr.report.analyze import MatrixSelection, analyze

    given = {name: getattr(arguments, name) for name in ("include", "exclude", "max_aspect")}
    selection = MatrixSelection(**{name: value for name, value in given.items() if value})
    options = {"steps": arguments.steps, "selection": selection, "force": arguments.force}
    with closing(World.from_environment(device=arguments.device)) as world, writing(arguments.out):
        out = analyze(arguments.checkpoints, arguments.out, **options, world=world, progress=progress_lines())
    show(out)


def progress_lines(
    every_s: float = 10.0, clock: Callable[[], float] = time.monotonic
) -> Callable[[int, int], None]:
    """A callback that prints a line on standard error now and then: large checkpoints take hours."""
    start = last = clock()

    def report(done: int, of: int) -> None:
        nonlocal last
        now = clock()
        if now < last + every_s or done == of or not is_main():
            return
        last = now
        left = clock_time((now - start) * (of - done) / done)
        sys.stderr.write(f"oialr: {done} of {of} layers measured, about {left} to go\n")

    return report
