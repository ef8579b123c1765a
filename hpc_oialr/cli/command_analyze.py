"""``oialr analyze``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpc_oialr.cli.console import add_command, add_force, console, is_main, show_warnings
from hpc_oialr.errors import OIALRError
from hpc_oialr.record.progress import clock_time

EXAMPLES = """  oialr analyze checkpoint-500 checkpoint-1000 checkpoint-1500 --out spectra.h5
  oialr analyze epoch*.pt --include "encoder.*" --out encoder.h5
  oialr analyze first.safetensors last.safetensors --steps 0 9000 --out two.h5
  torchrun --nproc-per-node 4 -m hpc_oialr analyze runs/dense/checkpoints/step_* --out spectra.h5
  oialr spectra plot spectra.h5          (then, as for a run; also show, export, and oialr report)

A checkpoint: a safetensors file, a torch file with a state dict (never one that would run code), a folder as
transformers writes it, or a run's checkpoints/step_NUMBER, all of one dense model."""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    summary = "write the spectra of a training's checkpoints, made here or elsewhere"
    parser = add_command(commands, "analyze", summary=summary, examples=EXAMPLES)
    parser.add_argument("checkpoints", metavar="CHECKPOINT", type=Path, nargs="+", help="file or folder")
    parser.add_argument("--out", metavar="FILE.h5", type=Path, required=True, help="file to write")
    parser.add_argument(
        "--steps",
        metavar="N",
        type=int,
        nargs="+",
        help="of the checkpoints, in the order given; default the last numbers in their names",
    )
    parser.add_argument(
        "--include",
        metavar="PATTERN",
        nargs="+",
        help="shell patterns of layers that are measured; default all",
    )
    parser.add_argument(
        "--exclude", metavar="PATTERN", nargs="+", help="of those that are not; default tables of embeddings"
    )
    parser.add_argument(
        "--max-aspect", metavar="X", type=float, help="leave out matrices longer than that; default 10"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add_force(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, then print the file's path."""
    from hpc_oialr.distributed import World
    from hpc_oialr.report.analyze import MatrixSelection, analyze

    show_warnings()
    names = ("include", "exclude", "max_aspect")
    given: dict[str, Any] = {name: getattr(arguments, name) for name in names if getattr(arguments, name)}
    selection = MatrixSelection(**given)
    world = World.from_environment(device=arguments.device)
    try:
        out = analyze(
            arguments.checkpoints,
            arguments.out,
            steps=arguments.steps,
            selection=selection,
            world=world,
            progress=_Lines(),
            force=arguments.force,
        )
    except OSError as error:
        if isinstance(error, OIALRError):
            raise
        raise OIALRError(
            f"{arguments.out} cannot be written ({error}); name another place by --out."
        ) from error
    finally:
        world.close()
    console().print(str(out), markup=False)
    return 0


class _Lines:
    """A line on standard error now and then: large checkpoints take hours."""

    def __init__(self, every_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s, self._clock, self._start = every_s, clock, clock()
        self._next = self._start + every_s

    def __call__(self, done: int, of: int) -> None:
        now = self._clock()
        if now < self._next or done == of or not is_main():
            return
        self._next = now + self._every_s
        left = clock_time((now - self._start) * (of - done) / done)
        sys.stderr.write(f"oialr: {done} of {of} layers measured, about {left} to go\n")
