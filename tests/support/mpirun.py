"""mpirun for tests: whether it is there, and how it is called."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2]


def _why_not() -> str | None:
    if shutil.which("mpirun") is None:
        return "mpirun is not installed"
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed"
    said = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=False).stdout
    return None if "Open MPI" in said else "mpirun is not Open MPI's"


WHY_NOT = _why_not()
needs_mpirun = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")


def python_environment() -> dict[str, str]:
    """Variables under which this checkout and the tests' own modules are found, one thread a process."""
    path = os.pathsep.join([str(HERE), str(HERE / "tests")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def mpirun(processes: int, *words: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS`` in so many processes, on however many cores there are."""
    environment = python_environment() | {"OMPI_MCA_mpi_yield_when_idle": "1"}
    if os.geteuid() == 0:
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = ["mpirun", "--oversubscribe", "-n", str(processes), sys.executable, *words]
    return subprocess.run(
        command, env=environment, cwd=HERE, capture_output=True, text=True, timeout=timeout_s, check=False
    )
