"""Which channel is chosen, and the message when MPI counts otherwise than the launcher."""

from __future__ import annotations

import importlib
import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.crowd import Crowd, Say
from support.mpirun import needs_mpirun, python_environment
from support.spawn import free_port, launch_environment

from hpc_oialr.distributed import World, mpi, open_channel
from hpc_oialr.distributed.environment import under_mpi
from hpc_oialr.distributed.metric_reduction import MPIPlace, _place, check_places
from hpc_oialr.errors import WorldError

OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}


@pytest.mark.parametrize(
    "environ",
    [
        OPEN_MPI,
        {"PMIX_RANK": "0", "SLURM_STEP_ID": "0"},
        {"PMI_RANK": "1", "PMI_SIZE": "2"},
        {"PMI_FD": "11"},
    ],
)
def test_started_under_mpi(environ: dict[str, str]) -> None:
    assert under_mpi(environ)
    assert not under_mpi(environ | {"TORCHELASTIC_RUN_ID": "none"}), "a child of torchrun is not"


@pytest.mark.parametrize("environ", [{}, {"RANK": "0", "WORLD_SIZE": "2"}, {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}])
def test_not_started_under_mpi(environ: dict[str, str]) -> None:
    assert not under_mpi(environ)


def test_ranks_that_agree() -> None:
    check_places([MPIPlace(rank, 3, "X") for rank in range(3)], World(size=3))


def test_every_process_alone() -> None:
    places = [MPIPlace(0, 1, "Open MPI v5.0.7")] * 2
    with pytest.raises(
        WorldError,
        match=r"Open MPI v5\.0\.7 counts rank 0 of 2 \(slurm\) as rank 0 of 1; both must agree\. .*"
        r"start Open MPI with srun --mpi=pmix, MPICH or Intel MPI with srun --mpi=pmi2",
    ):
        check_places(places, World(size=2, launcher="slurm"))


def test_ranks_in_another_order() -> None:
    with pytest.raises(WorldError, match=r"counts rank 0 of 2 \(mpi\) as rank 1 of 2"):
        check_places([MPIPlace(1, 2, "X"), MPIPlace(0, 2, "X")], World(size=2, launcher="mpi"))


def alone(rank: int, size: int, say: Say) -> None:
    """A made-up MPI that gives every process the same place."""
    place = SimpleNamespace(rank=0, size=1)
    library = SimpleNamespace(COMM_WORLD=place, Get_library_version=lambda: "Fake MPI v1, somewhere\n")
    module = importlib.import_module("hpc_oialr.distributed.metric_reduction")
    module.join_mpi = lambda environ=None: library  # type: ignore[attr-defined]
    open_channel(World.from_environment(device="cpu", timeout_s=60), environ=OPEN_MPI)


def test_the_wrong_pmi_stops_every_process() -> None:
    with Crowd(alone, 2) as crowd:
        ends = [crowd.end(rank) for rank in range(2)]
    assert {code for code, _ in ends} == {1}
    for _, message in ends:
        assert message.startswith("WorldError: Fake MPI v1 counts rank 0 of 2 (torchrun) as rank 0 of 1")
        assert "srun --mpi=pmix" in message


@needs_mpirun
def test_the_wrong_pmi_for_real(tmp_path: Path) -> None:
    """Two processes with Open MPI's variables but no PMI to ask: to the library each is alone."""
    port, processes = free_port(), []
    for rank in range(2):
        environ = python_environment() | launch_environment(rank, 2, port) | OPEN_MPI
        words = [sys.executable, "-m", "support.mpi_program", "place", str(tmp_path)]
        processes.append(subprocess.Popen(words, env=environ, stderr=subprocess.DEVNULL))
    assert [process.wait(timeout=120) for process in processes] == [1, 1]
    for rank in range(2):
        refused = json.loads((tmp_path / f"{rank}.json").read_text())["refused"]
        assert "counts rank 0 of 2 (torchrun) as rank 0 of 1; both must agree" in refused
        assert "srun --mpi=pmix" in refused


def without_mpi4py(rank: int, size: int, say: Say) -> None:
    sys.modules["mpi4py"] = None  # type: ignore[assignment]
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hpc_oialr").addHandler(handler)
    world = World.from_environment(device="cpu", timeout_s=60)
    say((open_channel(world, environ=OPEN_MPI).name, lines))
    world.close()


def test_without_mpi4py_gloo_and_one_line() -> None:
    with Crowd(without_mpi4py, 2) as crowd:
        (code, (name, lines)), (_, (other, none)) = (crowd.end(rank) for rank in range(2))
    assert (code, name, other, none) == (0, "gloo", "gloo", [])
    assert len(lines) == 1
    assert "MPI started this run but rank 0 cannot use it" in lines[0]
    assert 'pip install "hpc_oialr[mpi]"' in lines[0]


def test_one_process_and_an_adopted_group_stay_on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpc_oialr.distributed.metric_reduction.join_mpi", lambda environ: pytest.fail("MPI is joined"))
    for world in (World(launcher="mpi"), World(size=2, launcher="adopted")):
        assert _place(world, OPEN_MPI) == "not started by MPI"


def test_open_mpi_does_without_pmi2() -> None:
    library = SimpleNamespace(Get_library_version=lambda: "Open MPI v4.1.4, package: Debian")
    with pytest.raises(RuntimeError, match=r"Open MPI v4.1.4 through PMI2, .* srun --mpi=pmix"):
        mpi._refuse_pmi2(library, {"PMI_FD": "11"})
    for fine in ({"PMI_FD": "11", "PMIX_RANK": "0"}, {"PMIX_RANK": "0"}):
        mpi._refuse_pmi2(library, fine)
