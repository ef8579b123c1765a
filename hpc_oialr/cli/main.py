"""``oialr``: the entry point."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from hpc_oialr import __version__, exit_codes
from hpc_oialr.cli.console import add_command, show_error, show_warnings
from hpc_oialr.distributed.environment import launch_info
from hpc_oialr.distributed.mpi import leave_mpi
from hpc_oialr.distributed.signals import end_at_once_upon, leave_upon_term, unwind_upon
from hpc_oialr.errors import OIALRError, WorldError
from hpc_oialr.streams import tolerate_output_failures
from hpc_oialr.system_errors import of_system

# In the order of the help; each in its command_NAME.py, whose docstring is its summary.
COMMANDS = (
    *("train", "finetune", "compare", "recipes", "data", "resume", "eval", "export", "spectra", "report", "analyze"),
    *("tensor", "operator", "info", "plan", "doctor", "submit", "search", "jobs", "logs", "cancel", "completion"),
)
# These also take settings of a run, e.g. --train.epochs 1.
_WITH_SETTINGS = ("train", "finetune", "compare", "resume", "eval", "plan", "submit", "search")
_ENDING = ("INT", "TERM", "HUP")

EXAMPLES = """examples:
  oialr recipes
  oialr train fashion_mnist_vit --train.epochs 1 --out runs/first
  oialr compare fashion_mnist_vit --own
  torchrun --nproc-per-node 2 -m hpc_oialr train fashion_mnist_vit
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="oialr",
        description="Low-rank training that pays.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hpc_oialr {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"hpc_oialr.cli.command_{name}")
        summary = (module.__doc__ or name).rstrip(".")
        run = getattr(module, "run", None)
        command = add_command(commands, name, run, summary=summary, examples=module.EXAMPLES)
        command.set_defaults(takes_settings=name in _WITH_SETTINGS)
        module.add(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code, see :mod:`hpc_oialr.exit_codes`.

    Errors that a user can fix, also those of the operating system and a lack of memory, are printed as one line.
    """
    try:
        parser = make_parser()
        # What the parser does not know is a setting of the run.
        arguments, settings = parser.parse_known_args(argv)
        if settings and not arguments.takes_settings:
            parser.error(f"unrecognized arguments: {' '.join(settings)}")
        arguments.settings = settings
        arguments.words = sys.argv[1:] if argv is None else list(argv)
        show_warnings()
        return arguments.run(arguments) or exit_codes.FINISHED
    except OIALRError as error:
        show_error(error)
        return exit_codes.of_error(error)
    except (OSError, UnicodeDecodeError, MemoryError, RuntimeError) as error:
        refused = of_system(error)
        if refused is None:
            raise
        show_error(refused)
        return exit_codes.of_error(refused)
    except KeyboardInterrupt:
        return 130


def entry() -> None:
    """The console script."""
    tolerate_output_failures()
    try:
        alone = launch_info().size == 1
    except WorldError:
        alone = True  # the command reports it, or does not need it
    if alone:
        unwind_upon(*_ENDING)
        code = main()
        end_at_once_upon(*_ENDING)
        gc.freeze()  # or half a million objects would be searched for garbage once more
        sys.exit(code)
    unwind_upon("INT")
    launcher = launch_info().launcher
    if launcher == "slurm":
        leave_upon_term(exit_codes.PROCESS_LOST)
    code = 1
    try:
        code = main()
    except SystemExit as left:  # of the parser
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if code in (exit_codes.FINISHED, exit_codes.STOPPED):
        leave_mpi()
    # Whatever still refers to the process group would be torn down together with the interpreter, which
    # hangs or aborts now and then; all files are closed by now.
    os._exit(exit_codes.of_task(code, launcher))
