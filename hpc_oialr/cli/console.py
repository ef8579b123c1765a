"""What every command shares: where it prints, and how."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from hpc_oialr.distributed import launch_info
from hpc_oialr.errors import HostError, OIALRError, ReplicaMismatchError, SampleError, WorldError
from hpc_oialr.redaction import one_line

# Errors that may befall one process alone; all others are the same everywhere.
OF_ONE_PROCESS = (WorldError, ReplicaMismatchError, SampleError, HostError)
GRACE_S = 3.0
_WIDE = 1000


def is_main() -> bool:
    """Whether this process prints; True where the launcher's variables contradict each other."""
    try:
        return launch_info().rank == 0
    except WorldError:
        return True


def console(*, of_every_process: bool = False) -> Console:
    """Standard output of the main process, nowhere for the others unless each is to print.

    A file or a pipe has no width, so nothing is cut there, unless ``COLUMNS`` is set.
    """
    out = Console(quiet=not (of_every_process or is_main()), soft_wrap=True, highlight=False)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = _WIDE
    return out


def show_error(error: OIALRError) -> None:
    """One line on standard error, from the main process or from the one that it befell."""
    if is_main() or isinstance(error, OF_ONE_PROCESS):
        sys.stderr.write(one_line(f"oialr: error: {error}") + "\n")
    else:
        # The launcher ends all processes when the first one leaves: the main one must get to its message.
        time.sleep(GRACE_S)


def show_warnings() -> None:
    """The package's warnings on standard error, from the main process."""
    logger = logging.getLogger("hpc_oialr")
    if not any(isinstance(handler, WarningLines) for handler in logger.handlers):
        logger.addHandler(WarningLines(logging.WARNING))


class WarningLines(logging.Handler):
    """One line for each warning, on whatever standard error is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line."""
        if is_main():
            sys.stderr.write(one_line(f"oialr: {record.levelname.lower()}: {record.getMessage()}") + "\n")


def add_command(
    commands: Any, name: str, *, summary: str, examples: str, takes_settings: bool = False
) -> argparse.ArgumentParser:
    """A subcommand's parser with its help and examples."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(takes_settings=takes_settings)
    return parser


def add_force(parser: argparse.ArgumentParser) -> None:
    """The option that lets ``--out`` replace what the command did not write."""
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace what --out names, or files of the same names in that folder, though not written by oialr",
    )


def summary_table(summary: dict[str, Any], title: str) -> Table:
    """One run's summary."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for label, key, form in rows(summary):
        table.add_row(label, form.format(summary[key]))
    return table


def rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Label, key and number format of what a table shows of a summary."""
    form = "{:.2%}" if summary["metric_name"].endswith("accuracy") else "{:.4f}"
    return [
        (summary["metric_name"].replace("_", " "), "metric", form),
        ("wall time (s)", "wall_s", "{:.1f}"),
        ("of it updates (s)", "update_wall_s", "{:.2f}"),
        ("trained parameters", "trainable_params", "{:,}"),
        ("the same, dense", "dense_trainable_params", "{:,}"),
        ("peak memory (GiB)", "peak_memory_gib", "{:.3f}"),
        ("steps", "steps", "{:,}"),
    ]
