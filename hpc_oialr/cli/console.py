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

from rich.console import Console

from hpc_oialr.distributed import launch_info
from hpc_oialr.errors import HostError, OIALRError, ReplicaMismatchError, SampleError, WorldError
from hpc_oialr.redaction import one_line

# Errors that may occur in one process alone; all others are the same everywhere.
OF_ONE_PROCESS = (WorldError, ReplicaMismatchError, SampleError, HostError)
GRACE_S = 3.0
_WIDE = 1000

# -- parsers -------------------------------------------------------------------------------------------


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int | None] | None = None,
    *,
    summary: str,
    examples: str,
    takes_settings: bool = False,
) -> argparse.ArgumentParser:
    """A subcommand's parser with its help and examples; ``run`` may return an exit code."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(takes_settings=takes_settings)
    if run is not None:
        parser.set_defaults(run=run)
    return parser


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The recipe that a command is about."""
    explained = "name of a recipe (see oialr recipes), or a YAML file"
    parser.add_argument("recipe", metavar="RECIPE|FILE", help=explained)


def add_run(parser: argparse.ArgumentParser) -> None:
    """The run that a command is about."""
    parser.add_argument("folder", metavar="RUN", type=Path, help="folder of the run")


def add_force(parser: argparse.ArgumentParser) -> None:
    """The option that lets ``--out`` replace what the command did not write."""
    explained = (
        "replace what --out names, or files of the same names in that folder, though not written by oialr"
    )
    parser.add_argument("--force", action="store_true", help=explained)


# -- output --------------------------------------------------------------------------------------------


def is_main() -> bool:
    """Whether this process prints; True where the launcher's variables contradict each other."""
    try:
        return launch_info().rank == 0
    except WorldError:
        return True


def console(*, of_every_process: bool = False) -> Console:
    """Standard output of rank 0, nowhere for the others unless each is to print.

    A file or a pipe has no width, so nothing is cut there, unless ``COLUMNS`` is set.
    """
    out = Console(quiet=not (of_every_process or is_main()), soft_wrap=True, highlight=False)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = _WIDE
    return out


def show(text: object, *, end: str = "\n") -> None:
    """Print a path or a text as it is."""
    console().print(str(text), markup=False, end=end)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the output, and the option that names another, if it cannot be written."""
    try:
        yield
    except OIALRError:
        raise
    except OSError as error:
        raise OIALRError(f"{path} cannot be written ({error}); name another place by --out.") from error


def show_error(error: OIALRError) -> None:
    """One line on standard error, from rank 0 or from the process in which it occurred."""
    if is_main() or isinstance(error, OF_ONE_PROCESS):
        sys.stderr.write(one_line(f"oialr: error: {error}") + "\n")
    else:
        # The launcher ends all processes when the first one leaves: rank 0 must get to its message.
        time.sleep(GRACE_S)


def show_warnings() -> None:
    """The package's warnings on standard error, from rank 0."""
    logger = logging.getLogger("hpc_oialr")
    if not any(isinstance(handler, WarningLines) for handler in logger.handlers):
        logger.addHandler(WarningLines(logging.WARNING))


class WarningLines(logging.Handler):
    """One line for each warning, on whatever standard error is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line."""
        if is_main():
            sys.stderr.write(one_line(f"oialr: {record.levelname.lower()}: {record.getMessage()}") + "\n")
