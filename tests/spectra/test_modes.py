"""Who writes what: the main process, each a file of its own, or all one file; equal records in every mode."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import pytest
from support.mpirun import HERE, mpirun, needs_mpirun
from support.spectra_reports import ATTRIBUTES, content, report, step_row, steps_in

from hpc_oialr.errors import ConfigError, DataError
from hpc_oialr.spectra import names, open
from hpc_oialr.spectra.merge import merge
from hpc_oialr.spectra.modes import Mode, finish_record, make_writer
from hpc_oialr.spectra.names import side_path
from hpc_oialr.spectra.parallel import check_parallel
from hpc_oialr.spectra.writer import SpectraWriter

LAYERS = tuple(f"encoder.{i}/dense%" for i in range(11))


@dataclass
class Place:
    """What of a World the modes ask for; all processes live in this one, one after the other."""

    rank: int
    size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """The last process comes last here."""


class Crowd:
    """All processes' writers of one record."""

    def __init__(self, mode: Mode, head: Path, size: int, side: Path | None = None) -> None:
        self.mode, self.head = mode, head
        self.places = [Place(rank, size) for rank in range(size)]
        folder = None if side is None else str(side)
        self.writers: list[SpectraWriter | None] = [
            make_writer(mode, head, place, layers=LAYERS, attributes=ATTRIBUTES, side_folder=folder)
            for place in self.places
        ]

    def write(self, steps: Sequence[int]) -> Crowd:
        for t in steps:
            # As in a run: all layers at the conversion, then the last ones first.
            event = report(t, names=LAYERS if t == 1 else LAYERS[-t:])
            for writer in filter(None, self.writers):
                writer.write(event)
        main = self.writers[0]
        assert main is not None
        for t in steps:
            main.add_steps(step_row(t))
        for writer in filter(None, self.writers):
            assert writer.flush()
        return self

    def cut(self, t: int) -> Crowd:
        for writer in filter(None, self.writers):
            writer.truncate_after(t)
        return self

    def finish(self) -> None:
        for place, writer in reversed(list(zip(self.places, self.writers, strict=True))):
            finish_record(self.mode, writer, self.head, place)
        for writer in filter(None, self.writers):
            writer.close()


@pytest.fixture
def single(tmp_path: Path) -> Path:
    path = tmp_path / "single" / "spectra.h5"
    path.parent.mkdir()
    crowd = Crowd("single", path, 8)
    assert [writer is None for writer in crowd.writers] == [False] + [True] * 7
    crowd.write(range(1, 9)).finish()
    return path


def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "spectra.h5"
    path.parent.mkdir()
    return path


def plain(path: Path) -> dict[str, bytes]:
    """Every data set as any HDF5 reader finds it."""
    found: dict[str, bytes] = {}

    def take(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item[()].tobytes()

    with h5py.File(path, "r") as file:
        file.visititems(take)
    return found


def test_a_file_for_each_process(tmp_path: Path, single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path)
    crowd = Crowd("per_process", path, 8).write(range(1, 9))
    parts = [f"spectra.p{rank:04d}.h5" for rank in range(8)]
    assert sorted(file.name for file in path.parent.iterdir()) == parts
    with open(path.parent / parts[3]) as part:
        assert part.layers == (LAYERS[3],)
    assert content(path) == content(single), "while it is written"
    crowd.finish()
    assert sorted(file.name for file in path.parent.iterdir()) == ["spectra.h5", *parts]
    assert content(path) == content(single)
    moved = path.parent.rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    assert plain(moved / "spectra.h5") == plain(single), "for any HDF5 reader, wherever it lies"
    with h5py.File(moved / "spectra.h5") as file:
        assert file["layers/encoder.0%2Fdense%25/events"].is_virtual
    assert merge(moved, copy=True) == moved / "spectra.h5"
    assert [file.name for file in moved.iterdir()] == ["spectra.h5"]
    assert content(moved) == content(single)


def test_a_damaged_part_is_not_passed_over(tmp_path: Path) -> None:
    """HDF5 itself shows fill values in the place of a file that it cannot read."""
    path = folder(tmp_path)
    Crowd("per_process", path, 4).write(range(1, 9)).finish()
    part = path.with_name("spectra.p0002.h5")
    part.write_bytes(part.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"spectra.p0002.h5 is damaged"):
        open(path)


def test_going_on_with_fewer_processes(tmp_path: Path, single: Path) -> None:
    path = folder(tmp_path)
    Crowd("per_process", path, 8).write(range(1, 7))
    crowd = Crowd("per_process", path, 3).cut(4)
    assert steps_in(path, LAYERS[10]) == [1, 2, 3, 4]
    crowd.write(range(5, 9)).finish()
    assert content(path) == content(single)
    assert plain(path) == plain(single)


def test_going_on_with_more_processes_after_the_end(tmp_path: Path, single: Path) -> None:
    path = folder(tmp_path)
    Crowd("per_process", path, 2).write(range(1, 7)).finish()
    crowd = Crowd("per_process", path, 5).cut(4)
    assert not path.exists(), "the old master"
    crowd.write(range(5, 9)).finish()
    assert content(path) == content(single)
    assert plain(path) == plain(single)


def test_one_process_whose_disk_is_full(
    tmp_path: Path, single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    path = folder(tmp_path)
    crowd = Crowd("per_process", path, 4)
    third = crowd.writers[2]
    assert third is not None
    path.with_name(".spectra.p0002.h5.tmp").mkdir()
    crowd.write(range(1, 9))
    side = side_path(path.with_name("spectra.p0002.h5"))
    assert side.exists()
    assert third.written == 8
    assert content(path) == content(single)
    path.with_name(".spectra.p0002.h5.tmp").rmdir()
    merge(path.parent)
    assert not side.exists()
    assert content(path) == content(single)
    assert plain(path) == plain(single)


class NoMPI:
    """h5py as the wheels have it."""

    mpi = False


def test_parallel_needs_an_h5py_with_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h5py, "get_config", NoMPI)
    with pytest.raises(ConfigError) as raised:
        check_parallel(object())
    assert str(raised.value).startswith(
        f"record.spectra_writer is 'parallel'; h5py {h5py.__version__} here was built without MPI. Build h5py with MPI"
    )
    assert "HDF5_MPI=ON" in str(raised.value)
    assert "--no-build-isolation --no-deps --no-binary=h5py h5py" in str(raised.value)
    monkeypatch.setattr(NoMPI, "mpi", True)
    with pytest.raises(
        ConfigError, match="needs processes that MPI started. Start with mpirun or srun --mpi=pmix"
    ):
        check_parallel(None)


@needs_mpirun
@pytest.mark.skipif(not h5py.get_config().mpi, reason="h5py was built without MPI")
def test_all_modes_under_mpirun(tmp_path: Path) -> None:
    done = mpirun(4, "-m", "benchmarks.spectra_modes", "--out", str(tmp_path / "modes.json"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "modes.json").read_text())["rows"]
    assert [(row["mode"], row["equal"]) for row in rows] == [
        ("single", True), ("per_process", True), ("parallel", True)
    ]  # fmt: skip


def test_the_package_reads_without_torch(single: Path) -> None:
    """On a login node, where importing torch takes half a minute."""
    script = "import sys, hpc_oialr.spectra as s; print(len(s.open(sys.argv[1])), 'torch' in sys.modules)"
    command = [sys.executable, "-W", "error", "-c", script, str(single)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["11", "False"]
