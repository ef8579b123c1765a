"""What the commands share: parsers, where they print, errors and warnings in one line."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from hpc_oialr.distributed import launch_info
from hpc_oialr.errors import HostError, OIALRError, ReplicaMismatchError, SampleError, WorldError
from hpc_oialr.redaction import one_line


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int | None] | None = None,
    *,
    summary: str,
    examples: str,
) -> argparse.ArgumentParser:
    """A subcommand's parser with its help and examples; ``run`` may return an exit code."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=f"{summary[0].lower()}{summary[1:]}",
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if run is not None:
        parser.set_defaults(run=run)
    return parser


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The recipe that a command is about."""
    parser.add_argument("recipe", metavar="RECIPE|FILE", help="name (see oialr recipes), or a YAML file")


def add_run(parser: argparse.ArgumentParser) -> None:
    """The run that a command is about."""
    parser.add_argument("folder", metavar="RUN", type=Path, help="folder of the run")


def add_out(parser: argparse.ArgumentParser, metavar: str, explained: str) -> None:
    """The options for an output and for replacing what is in its place."""
    parser.add_argument("--out", metavar=metavar, type=Path, help=explained)
    add_force(parser)


def add_force(parser: argparse.ArgumentParser) -> None:
    """The option that lets ``--out`` replace what the command did not write."""
    explained = "replace what --out names, or files of the same names in it, though not written by oialr"
    parser.add_argument("--force", action="store_true", help=explained)


def is_main() -> bool:
    """Whether this process prints: rank 0, and every process if the launcher's variables contradict each other."""
    try:
        return launch_info().rank == 0
    except WorldError:
        return True


def console(*, every_rank: bool = False) -> Console:
    """Standard output of rank 0, or of every rank."""
    out = Console(quiet=not (every_rank or is_main()), soft_wrap=True, highlight=False)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = 1000  # a file or a pipe has no width: nothing is cut
    return out


def new_table(title: str, first: Column | str, *numbers: str) -> Table:
    """A table without rows; all columns but the first are right-aligned."""
    columns = (Column(name, justify="right") for name in numbers)
    return Table(first, *columns, title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def show(text: object, *, end: str = "\n") -> None:
    """Print a path or a text as it is."""
    console().print(str(text), markup=False, end=end)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise OIALRError that names the output and the option ``--out`` if it cannot be written."""
    try:
        yield
    except OIALRError:
        raise
    except OSError as error:
        raise OIALRError(f"{path} cannot be written ({error}); name another place by --out.") from error


def show_error(error: OIALRError) -> None:
    """One line on standard error, from rank 0 or from the rank on which it occurred."""
    # These may occur on one rank alone; all others are the same on every rank.
    if is_main() or isinstance(error, (WorldError, ReplicaMismatchError, SampleError, HostError)):
        sys.stderr.write(one_line(f"oialr: error: {error}") + "\n")
    else:
        # The launcher ends all processes when the first one exits: rank 0 needs time for its message.
        time.sleep(3.0)


class _WarningLines(logging.Handler):
    """One line for each warning, from rank 0, on whatever standard error is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        if is_main():
            sys.stderr.write(one_line(f"oialr: {record.levelname.lower()}: {record.getMessage()}") + "\n")


_WARNINGS = _WarningLines(logging.WARNING)


def show_warnings() -> None:
    """Print the package's warnings on standard error."""
    logging.getLogger("hpc_oialr").addHandler(_WARNINGS)  # once, also if it is called again
