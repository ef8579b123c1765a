"""``oialr spectra``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

from hpc_oialr.cli.console import add_command, add_force, console, show_warnings
from hpc_oialr.cli.spectra_plot import add_plot
from hpc_oialr.errors import DataError, OIALRError
from hpc_oialr.record import RunFolder

EXAMPLES = """  oialr spectra show runs/first
  oialr spectra watch runs/first --layers "encoder.*"
  oialr spectra plot runs/first --figure stability --out stability.pdf
  oialr spectra export runs/first --format parquet
  oialr spectra merge runs/first
  oialr spectra repair runs/first/spectra.h5"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "spectra",
        summary="show, watch, plot, export, merge or repair a run's spectra",
        examples=EXAMPLES,
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    for add_action in (_add_show, _add_watch, add_plot, _add_export, _add_merge, _add_repair):
        add_action(actions)


def _action(actions: Any, name: str, summary: str) -> argparse.ArgumentParser:
    own = [line for line in EXAMPLES.splitlines() if f" {name} " in line]
    parser = add_command(actions, name, summary=summary, examples="\n".join(own))
    parser.add_argument("path", metavar="FILE", type=Path, help="a run's folder or its spectra.h5")
    return parser


def _add_show(actions: Any) -> None:
    parser = _action(actions, "show", "show every layer as it stood after its last event")
    parser.add_argument(
        "--layers", metavar="PATTERN", default="*", help="shell pattern of names; default all"
    )
    parser.set_defaults(run=show)


def _add_watch(actions: Any) -> None:
    parser = _action(actions, "watch", "follow a running job's spectra, until it ends or Ctrl-C")
    parser.add_argument(
        "--layers", metavar="PATTERN", default="*", help="shell pattern of names; default all"
    )
    parser.add_argument(
        "--every", metavar="SECONDS", type=float, default=2.0, help="time between two looks; default 2"
    )
    parser.set_defaults(run=watch)


def _add_export(actions: Any) -> None:
    parser = _action(actions, "export", "write tables of events, steps and singular values")
    parser.add_argument("--format", choices=("csv", "parquet"), default="csv", help="default: csv")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write; default spectra_FORMAT in the run's"
    )
    add_force(parser)
    parser.set_defaults(run=export)


def _add_merge(actions: Any) -> None:
    parser = _action(actions, "merge", "join all files of a record whose run was stopped")
    # What it always does now.
    parser.add_argument("--copy", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(run=merge)


def _add_repair(actions: Any) -> None:
    parser = _action(actions, "repair", "save what can be read of a damaged record into a new file")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write; default FILE.repaired.h5")
    add_force(parser)
    parser.set_defaults(run=repair)


def show(arguments: argparse.Namespace) -> int:
    """Print the table."""
    from hpc_oialr.cli.spectra_tables import layers_table
    from hpc_oialr.spectra import open

    out = console()
    with open(arguments.path) as run:
        table = layers_table(run, arguments.layers)
    out.print(table)
    return 0


def watch(arguments: argparse.Namespace) -> int:
    """Show the table anew whenever it has changed.

    Raises
    ------
    DataError
        If there is neither a run nor a record.
    """
    from hpc_oialr.report.runs import Run

    Run(arguments.path)
    with Live(console=console(), auto_refresh=False) as live:
        for frame in frames(arguments.path, arguments.layers, arguments.every):
            live.update(frame, refresh=True)
    return 0


def frames(path: Path, pattern: str, every_s: float) -> Iterator[RenderableType]:
    """The table at one look after another; the last one after the run has ended."""
    from hpc_oialr.cli.spectra_tables import finished

    while True:
        # Asked first, so that the last look sees all that was written.
        last = finished(path)
        yield _frame(path, pattern)
        if last:
            return
        time.sleep(every_s)


def _frame(path: Path, pattern: str) -> RenderableType:
    from hpc_oialr.cli.spectra_tables import layers_table
    from hpc_oialr.spectra import open

    try:
        with open(path) as run:
            return layers_table(run, pattern)
    except DataError as error:
        # Before the first event there is no file.
        return Text(str(error))


def export(arguments: argparse.Namespace) -> int:
    """Write the files, then print their paths."""
    from hpc_oialr.spectra import open
    from hpc_oialr.spectra.tables import export as write

    with open(arguments.path) as run:
        written = write(run, arguments.format, arguments.out, force=arguments.force)
    for path in written:
        console().print(str(path), markup=False)
    return 0


def merge(arguments: argparse.Namespace) -> int:
    """Join, then print the path.

    Raises
    ------
    FolderInUseError
        If the run goes on: it joins its record itself, at its end.
    """
    from hpc_oialr.launch.slurm import job_over
    from hpc_oialr.record.owner import Claim
    from hpc_oialr.spectra.store import merge as join

    show_warnings()
    folder = RunFolder(arguments.path if arguments.path.is_dir() else arguments.path.parent)
    claim = Claim("oialr spectra merge", job_over)
    try:
        with closing(claim.take(folder)) if folder.holds_run else nullcontext():
            joined = join(arguments.path)
    except OSError as error:
        if isinstance(error, OIALRError):
            raise
        raise OIALRError(f"{arguments.path} cannot be merged ({error}); all files are as before.") from error
    console().print(str(joined), markup=False)
    return 0


def repair(arguments: argparse.Namespace) -> int:
    """Save, then tell what was lost."""
    from hpc_oialr.spectra.repair import repair as save

    result = save(arguments.path, arguments.out, force=arguments.force)
    for sentence in result.lost:
        console().print(f"lost: {sentence}", markup=False)
    saved = f"saved: {result.events} rows of events of {result.layers} layers, in {result.target}"
    console().print(saved, markup=False)
    return 0
