"""Records as earlier versions left them: heads behind their segments, files of processes, the first schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
from support.spectra_reports import ATTRIBUTES, NAMES, content, report, step_row, steps_in, writer_of

from hpc_oialr.errors import DataError
from hpc_oialr.spectra import open
from hpc_oialr.spectra.files import write_record
from hpc_oialr.spectra.schema import EVENT, SCHEMA_VERSION, rows_of_update, steps_of, together
from hpc_oialr.spectra.store import Chain, merge

PLACES = {name: place for place, name in enumerate(NAMES)}


def make_file(path: Path, steps: Sequence[int], names: tuple[str, ...] = NAMES, **attributes: object) -> None:
    rows = together([rows_of_update(report(t), PLACES) for t in steps])
    layers = [layer for layer in rows.layers if layer.name in names]
    write_record(path, ATTRIBUTES, layers, steps_of([step_row(t) for t in steps]).steps)
    with h5py.File(path, "a") as file:
        file.attrs.update(attributes)


def make_segments(folder: Path) -> None:
    """``spectra.h5`` held the newest rows, and said how many segments came before it."""
    for number, name in enumerate(("spectra.h5.001", "spectra.h5.002", "spectra.h5")):
        make_file(folder / name, range(2 * number + 1, 2 * number + 3), segments=2)


def make_parts(folder: Path) -> None:
    """Files of three processes with a segment of one, before the run's end."""
    for rank in range(3):
        make_file(
            folder / f"spectra.p{rank:04d}.h5", [3, 4, 5, 6] if rank == 1 else range(1, 7), NAMES[rank::3]
        )
    make_file(folder / "spectra.p0001.h5.001", [1, 2], NAMES[1::3])


def make_master(folder: Path) -> None:
    """At the run's end, a head that shows the files of all processes as one."""
    for rank in range(3):
        make_file(folder / f"spectra.p{rank:04d}.h5", range(1, 7), NAMES[rank::3])
    with h5py.File(folder / "spectra.h5", "w", libver="v110") as file:
        file.attrs.update({"schema_version": 2, "segments": 0, "virtual": True, "seed": 3})
        file.attrs["config"] = json.dumps(ATTRIBUTES["config"])
        for part in sorted(folder.glob("spectra.p*.h5")):
            with h5py.File(part) as source:
                for name, group in source["layers"].items():
                    file.create_group(f"layers/{name}").attrs.update(group.attrs)
                    for table in ("events", "singular_values"):
                        layout = h5py.VirtualLayout(group[table].shape, group[table].dtype)
                        layout[:] = h5py.VirtualSource(
                            part.name, f"layers/{name}/{table}".replace("%", "%%"), group[table].shape
                        )
                        file.create_virtual_dataset(f"layers/{name}/{table}", layout)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "spectra.h5"
    make_file(path, range(1, 9))
    return path


@pytest.mark.parametrize("make", [make_segments, make_parts, make_master])
def test_a_record_is_read_and_gone_on_with(tmp_path: Path, whole: Path, make) -> None:
    make(tmp_path)
    with open(tmp_path) as run:
        assert [layer.t.tolist() for layer in run.values()] == [list(range(1, 7))] * len(NAMES)
        assert run.layers == NAMES
        assert run.steps["step"].tolist() == list(range(1, 7))
        assert (run.attributes["seed"], run.config) == (3, {"beta": 0.1})
    chain = Chain(tmp_path / "spectra.h5", ATTRIBUTES)
    chain.cut_after(4)
    assert [steps_in(tmp_path, name) for name in NAMES] == [[1, 2, 3, 4]] * len(NAMES)
    for t in range(5, 9):
        chain.append(together([rows_of_update(report(t), PLACES), steps_of([step_row(t)])]))
    assert content(tmp_path) == content(whole)
    merge(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["spectra.h5"]
    assert content(tmp_path) == content(whole)
    with h5py.File(tmp_path / "spectra.h5") as file:
        assert not {"segments", "virtual"} & set(file.attrs)


def test_a_damaged_file_of_a_process_is_not_passed_over(tmp_path: Path) -> None:
    """HDF5 itself shows zeros in the place of a file that it cannot read."""
    make_master(tmp_path)
    part = tmp_path / "spectra.p0002.h5"
    part.write_bytes(part.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"spectra.p0002.h5 is damaged"):
        open(tmp_path)


def test_a_segment_that_the_head_counts_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpc_oialr.spectra.reader._PAUSE_S", 0)
    make_segments(tmp_path)
    (tmp_path / "spectra.h5.002").unlink()
    with pytest.raises(
        DataError, match=r"spectra.h5.002 does not exist, or changes; it is a part of .*spectra.h5"
    ):
        open(tmp_path)


def version_1(path: Path) -> None:
    """A file as the first version of the schema had it."""
    with h5py.File(path, "w", libver="v110") as file:
        file.attrs.update(
            {"schema_version": 1, "config": json.dumps({"beta": 0.2}), "seed": 7, "world_size": 1}
        )
        group = file.create_group("layers", track_order=True).create_group("encoder.0")
        group.attrs.update({"name": "encoder.0", "m": 6, "n": 5, "k": 5})
        rows = np.zeros(2, dtype=[(name, EVENT[name]) for name in (EVENT.names or ())[:9]])
        rows["t"], rows["r"], rows["stability"] = [10, 20], 3, 0.5
        group.create_dataset("events", data=rows, maxshape=(None,), chunks=(32,), fletcher32=True)
        values = np.float32([[4, 2, 1, np.nan, np.nan], [4, 1, 1, 1, np.nan]])
        group.create_dataset(
            "singular_values", data=values, maxshape=(None, 5), chunks=(1, 5), compression="gzip"
        )


def test_version_1_stays_readable_and_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "spectra.h5"
    version_1(path)
    with open(path) as run:
        layer = run["encoder.0"]
        assert layer.t.tolist() == [10, 20]
        assert layer["r"].tolist() == [3, 3]
        assert np.isnan(layer["stable_rank"]).all()
        assert len(run.steps) == 0
        assert run.config == {"beta": 0.2}
    writer = writer_of(path)
    writer.truncate_after(10)
    writer.write(report(20, names=NAMES[:1]))
    writer.finish()
    writer.close()
    with open(path) as run:
        assert run.attributes["schema_version"] == SCHEMA_VERSION
        layer = run["encoder.0"]
        assert layer.t.tolist() == [10, 20]
        assert layer["stable_rank"][0] == pytest.approx(21 / 16), (
            "told from the singular values when it is cut"
        )
        assert layer["condition_number"][0] == 4


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "spectra.h5"
    version_1(path)
    with h5py.File(path, "a") as file:
        file.attrs["schema_version"] = SCHEMA_VERSION + 1
    with pytest.raises(
        DataError, match=rf"schema version {SCHEMA_VERSION + 1}; must be at most {SCHEMA_VERSION}"
    ):
        open(path)
