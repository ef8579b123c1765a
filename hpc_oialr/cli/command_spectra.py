"""Show, watch, plot, export, merge or repair a run's spectra."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from hpc_oialr.cli.console import add_command, add_out, console, is_main, new_table, show, writing
from hpc_oialr.errors import DataError, OIALRError
from hpc_oialr.record import RunFolder

if TYPE_CHECKING:
    from hpc_oialr.spectra import Spectra

EXAMPLES = """  oialr spectra show runs/first
  oialr spectra watch runs/first --layers "encoder.*"
  oialr spectra plot runs/first --figure stability --out stability.pdf
  oialr spectra plot runs/first --figure waterfall --layer encoder.0 --width double --out waterfall.svg
  oialr spectra export runs/first --format parquet
  oialr spectra merge runs/first
  oialr spectra repair runs/first/spectra.h5"""
FIGURES = {
    "stability": "of every layer over training",
    "r": "heat map of r by layer and step",
    "waterfall": "singular values of one layer, with the cutoff and the noise edge",
}


def add(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    def action(name: str, run: Callable[[argparse.Namespace], None], summary: str) -> argparse.ArgumentParser:
        own = "\n".join(line for line in EXAMPLES.splitlines() if f" {name} " in line)
        parser = add_command(actions, name, run, summary=summary, examples=own)
        parser.add_argument("path", metavar="RUN", type=Path, help="a run's folder or its spectra.h5")
        return parser

    shown = action("show", run_show, "show every layer as it stood after its last event")
    watched = action("watch", run_watch, "follow a running job's spectra, until it ends or Ctrl-C")
    for parser in (shown, watched):
        parser.add_argument("--layers", metavar="PATTERN", default="*", help="names of layers; default all")
    watched.add_argument("--every", metavar="SECONDS", type=float, default=2.0, help="default 2")
    parser = action("plot", run_plot, "draw a figure for a paper")
    explained = "; ".join(f"{name}: {content}" for name, content in FIGURES.items())
    parser.add_argument("--figure", choices=tuple(FIGURES), default="stability", help=explained)
    parser.add_argument("--layer", metavar="NAME", help="of the waterfall; default the first")
    parser.add_argument("--width", choices=("single", "double"), default="single", help="columns of a paper")
    add_out(parser, "FILE", "file to write, .png, .pdf or .svg; default FIGURE.png")
    parser = action("export", run_export, "write tables of events, steps and singular values")
    parser.add_argument("--format", choices=("csv", "parquet"), default="csv", help="default: csv")
    add_out(parser, "DIR", "folder to write; default spectra_FORMAT in the run's")
    parser = action("merge", run_merge, "join all files of a record whose run was stopped")
    # Accepted for old command lines; it always copies now.
    parser.add_argument("--copy", action="store_true", help=argparse.SUPPRESS)
    parser = action("repair", run_repair, "save what can be read of a damaged record into a new file")
    add_out(parser, "FILE", "file to write; default FILE.repaired.h5")


def run_show(arguments: argparse.Namespace) -> None:
    from hpc_oialr.spectra import open

    with open(arguments.path) as run:
        console().print(layers_table(run, arguments.layers))


def run_watch(arguments: argparse.Namespace) -> None:
    """Show the table anew whenever it has changed; DataError if there is neither a run nor a record."""
    from hpc_oialr.report.runs import Run

    Run(arguments.path)
    with Live(console=console(), auto_refresh=False) as live:
        for frame in frames(arguments.path, arguments.layers, arguments.every):
            live.update(frame, refresh=True)


def frames(path: Path, pattern: str, every_s: float) -> Iterator[RenderableType]:
    """The table every ``every_s``; the last one after the run has ended."""
    from hpc_oialr.spectra import open

    while True:
        # Checked first, so that the last table shows all that was written.
        last = _folder(path).finished
        frame: RenderableType
        try:
            with open(path) as run:
                frame = layers_table(run, pattern)
        except DataError as error:
            # Before the first event there is no file.
            frame = Text(str(error))
        yield frame
        if last:
            return
        time.sleep(every_s)


def run_plot(arguments: argparse.Namespace) -> None:
    from hpc_oialr.report.plots import figure_of, save
    from hpc_oialr.report.runs import Run

    if not is_main():
        return
    path = arguments.out or Path(f"{arguments.figure}.png")
    with closing(Run(arguments.path)) as run, writing(path):
        figure = figure_of(arguments.figure, run, layer=arguments.layer, width=arguments.width)
        save(figure, path, inputs=[run.folder.path], force=arguments.force)
    show(path)


def run_export(arguments: argparse.Namespace) -> None:
    from hpc_oialr.spectra import open
    from hpc_oialr.spectra.tables import export

    with open(arguments.path) as run:
        written = export(run, arguments.format, arguments.out, force=arguments.force)
    for path in written:
        show(path)


def run_merge(arguments: argparse.Namespace) -> None:
    """Join all files; refused while the run is active, which joins its record itself at its end."""
    from hpc_oialr.launch.slurm import job_over
    from hpc_oialr.record.owner import Claim
    from hpc_oialr.spectra.store import merge

    folder = _folder(arguments.path)
    claim = Claim("oialr spectra merge", job_over)
    try:
        with closing(claim.take(folder)) if folder.holds_run else nullcontext():
            joined = merge(arguments.path)
    except OIALRError:
        raise
    except OSError as error:
        raise OIALRError(f"{arguments.path} cannot be merged ({error}); all files are as before.") from error
    show(joined)


def run_repair(arguments: argparse.Namespace) -> None:
    """Save what can be read, then list what was lost."""
    from hpc_oialr.spectra.store import repair

    result = repair(arguments.path, arguments.out, force=arguments.force)
    for sentence in result.lost:
        show(f"lost: {sentence}")
    show(f"saved: {result.events} rows of events of {result.layers} layers, in {result.target}")


_FIELDS = (
    ("stability", "stability", "{:.3f}"),
    ("stable rank", "stable_rank", "{:.1f}"),
    ("above noise", "values_above_edge", "{:.0f}"),
)


def layers_table(run: Spectra, pattern: str = "*") -> Table:
    """Each layer as it stood after its last event."""
    columns = "k", "r", "r / k", "events", "step", *(title for title, _, _ in _FIELDS)
    table = new_table(_headline(run), Column("layer", overflow="fold", min_width=20), *columns)
    for name, layer in run.items():
        if fnmatchcase(name, pattern) and len(layer):
            last, r = layer.events[-1], int(layer.r[-1])
            cells = [str(layer.k), str(r), f"{r / layer.k:.1%}", str(len(layer)), str(last["t"])]
            for _, field, form in _FIELDS:
                cells.append("" if math.isnan(last[field]) else form.format(last[field]))
            table.add_row(name, *cells)
    return table


def _headline(run: Spectra) -> str:
    """Path, number of layers and rows of events, last known step and loss."""
    from hpc_oialr.record.metrics import read_last_metrics

    parts = [str(run.path), f"{len(run)} layers", f"{len(run.events)} rows"]
    # metrics.jsonl is newer than the record, where there is one.
    rows = [row for row in read_last_metrics(_folder(run.path).metrics) if "metric" not in row]
    rows = rows or list(run.steps[-1:])
    if rows:
        step, loss = int(rows[-1]["step"]), rows[-1]["loss"]
        parts += [f"step {step}"] if loss is None else [f"step {step}", f"loss {loss:.4f}"]
    return ", ".join(parts)


def _folder(path: Path) -> RunFolder:
    return RunFolder(path if path.is_dir() else path.parent)
