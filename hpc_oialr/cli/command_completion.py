"""Print the script that completes commands, options and recipes in a shell."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from hpc_oialr.cli.console import show
from hpc_oialr.errors import MissingExtraError

EXAMPLES = """  oialr completion bash > ~/.local/share/bash-completion/completions/oialr
  oialr completion zsh > ~/.zsh/_oialr              (a folder of fpath, before compinit)
  oialr completion tcsh > ~/.oialr.tcsh             (source it in ~/.tcshrc)

Write it again after an update of the package."""
SHELLS = ("bash", "zsh", "tcsh")
# What stands for a folder or a file in the help of all commands.
FOLDERS = ("DIR", "FOLDER", "RUN", "RUN|CHECKPOINT")
FILES = ("FILE", "PATH", "CHECKPOINT")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="of whom")


def run(arguments: argparse.Namespace) -> None:
    try:
        import shtab
    except ImportError as error:
        raise MissingExtraError("shtab", "completion", purpose="oialr completion") from error
    from hpc_oialr.cli.main import make_parser
    from hpc_oialr.recipes import recipes

    parser, names = make_parser(), sorted(recipes())
    for action in _actions(parser):
        if action.metavar == "RECIPE|FILE":
            action.choices = names  # of the script alone: a file may be named too
        elif action.metavar in FOLDERS:
            action.complete = shtab.DIRECTORY
        elif action.metavar in FILES:
            action.complete = shtab.FILE
    show(shtab.complete(parser, arguments.shell))


def _actions(parser: argparse.ArgumentParser) -> Iterator[Any]:
    """Options and arguments of all commands, and of theirs."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action
