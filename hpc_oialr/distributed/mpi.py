"""mpi4py, used only in processes that mpirun or srun's MPI plugins started.

mpi4py is not imported before :func:`join_mpi`. MPI_Finalize waits for all processes, so it is called only after a run
without errors; a process that exits without it makes mpirun end the others.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

_END_S = 30.0


def join_mpi(environ: Mapping[str, str] | None = None) -> Any:
    """The module ``mpi4py.MPI``, initialised for calls from this thread; the second call returns at once.

    Raises ImportError or RuntimeError if mpi4py, or an MPI library under it, is missing, or cannot meet the others by
    srun's plugin.
    """
    mpi4py: Any = importlib.import_module("mpi4py")
    if "mpi4py.MPI" not in sys.modules:
        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
    mpi: Any = importlib.import_module("mpi4py.MPI")
    if not mpi.Is_initialized():
        _refuse_pmi2(mpi, os.environ if environ is None else environ)
        mpi.Init_thread(mpi.THREAD_FUNNELED)
    atexit.unregister(leave_mpi)
    return mpi


def leave_mpi_at_exit() -> None:
    """Finalize MPI when the interpreter ends; call it after a run without errors."""
    atexit.unregister(leave_mpi)
    atexit.register(leave_mpi)


def leave_mpi(within_s: float = _END_S) -> None:
    """Finalize MPI if :func:`join_mpi` initialised it; a collective call, only after a run without errors.

    If another process has died, this one prints its stack and exits with status 1 after ``within_s`` seconds.
    """
    mpi: Any = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized():
        return
    # Not a Python thread: MPI_Finalize holds the GIL.
    faulthandler.dump_traceback_later(within_s, exit=True, file=sys.__stderr__ or sys.stderr)
    mpi.Finalize()
    faulthandler.cancel_dump_traceback_later()


def library_name(mpi: Any) -> str:
    """The MPI library's name and version, e.g. "Open MPI v4.1.4"."""
    lines = str(mpi.Get_library_version()).strip().splitlines()
    return lines[0].split(",")[0].strip() if lines else "unknown"


def _refuse_pmi2(mpi: Any, env: Mapping[str, str]) -> None:
    """Raise RuntimeError where Open MPI's initialisation would end the process, since it lacks PMI2."""
    if "PMI_FD" in env and "PMIX_RANK" not in env and "Open MPI" in library_name(mpi):
        raise RuntimeError(
            f"srun started {library_name(mpi)} through PMI2, which most builds of it lack; start it with srun --mpi=pmix"
        )
