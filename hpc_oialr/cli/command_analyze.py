"""Write the spectra of a training's checkpoints, made here or elsewhere."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console

from hpc_oialr.cli.console import add_force, is_main, show, writing

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
    option("--steps", metavar="N", type=int, nargs="+", help="default the last numbers in their names")
    option("--include", metavar="PATTERN", nargs="+", help="layers that are measured; default all")
    option("--exclude", metavar="PATTERN", nargs="+", help="layers that are not; default embeddings")
    option("--max-aspect", metavar="X", type=float, help="leave out matrices longer than that; default 10")
    option("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add_force(parser)


def run(arguments: argparse.Namespace) -> None:
    from hpc_oialr.distributed import World
    from hpc_oialr.report.analyze import MatrixSelection, analyze

    given = {name: getattr(arguments, name) for name in ("include", "exclude", "max_aspect")}
    selection = MatrixSelection(**{name: value for name, value in given.items() if value})
    options: dict[str, Any] = {"steps": arguments.steps, "selection": selection, "force": arguments.force}
    with (
        closing(World.from_environment(device=arguments.device)) as world,
        writing(arguments.out),
        # Large checkpoints take hours; only terminals show it.
        Console(stderr=True, quiet=not is_main()).status("") as status,
    ):
        options["progress"] = lambda done, of: status.update(f"{done} of {of} layers measured")
        out = analyze(arguments.checkpoints, arguments.out, **options, world=world)
    show(out)
