"""``python -m hpc_oialr`` is ``oialr``."""

import sys

from hpc_oialr.garbage import search_seldom


def entry() -> None:
    """The console script; Ctrl-C during its imports gives no traceback."""
    search_seldom()
    try:
        from hpc_oialr.cli.main import entry as of_commands
    except KeyboardInterrupt:
        sys.exit(130)
    of_commands()


if __name__ == "__main__":
    entry()
