"""Load MPI, and start it if asked to; a wrong PMI may end or hang this process, and says so by that.

python try_mpi.py load|start
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any


def load() -> Any:
    """The module mpi4py.MPI, not initialised; None if it or the library is missing."""
    try:
        mpi4py: Any = importlib.import_module("mpi4py")
    except ImportError as error:
        return _say(missing="mpi4py", error=str(error))
    _say(mpi4py=str(mpi4py.__version__))
    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    try:
        mpi: Any = importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        return _say(missing="library", error=str(error).strip().splitlines()[0])
    lines = str(mpi.Get_library_version()).strip().splitlines()
    _say(library=" ".join(lines[0].split(",")[0].split()) if lines else "unknown")
    return mpi


def start(mpi: Any) -> None:
    """Initialise and end MPI; collective calls."""
    mpi.Init_thread(mpi.THREAD_FUNNELED)
    _say(rank=mpi.COMM_WORLD.rank, size=mpi.COMM_WORLD.size)
    mpi.Finalize()
    _say(ended=True)


def _say(**found: Any) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


def main(what: str) -> None:
    """Load, then start."""
    mpi = load()
    if mpi is not None and what == "start":
        start(mpi)


if __name__ == "__main__":
    main(sys.argv[1])
