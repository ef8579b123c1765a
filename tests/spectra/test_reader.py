"""Reading: lazily, as tables and arrays, one run or several, and clear errors."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from support.mpirun import HERE
from support.spectra_reports import NAMES, SEGMENTS, content, report, step_row, writer_of

import hpc_oialr.spectra as spectra
from hpc_oialr.errors import DataError, MissingExtraError, UnknownNameError
from hpc_oialr.spectra import reader
from hpc_oialr.spectra.files import RecordFile
from hpc_oialr.spectra.schema import EVENT, KINDS, SCHEMA_VERSION
from hpc_oialr.spectra.store import merge
from hpc_oialr.spectra.tables import export


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    writer = writer_of(folder / "spectra.h5", join=SEGMENTS)
    for t, kind in ((10, "stability"), (20, "conversion"), (30, "update")):
        writer.write(report(t, kind))
        writer.add_steps(step_row(t))
    writer.write(report(40, names=NAMES[:2]))
    writer.close()
    return folder


def test_only_what_is_asked_for_is_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = RecordFile._read

    def counted(file: RecordFile, layer: str, table: str, rows: Any = ()) -> Any:
        read.append(table)
        return original(file, layer, table, rows)

    monkeypatch.setattr(RecordFile, "_read", counted)
    with spectra.open(run) as opened:
        assert opened.layers == NAMES
        assert read == []
        assert len(opened["encoder.0"]) == 4
        assert set(read) == {"events"}
        read.clear()
        assert opened["encoder.0"].spectrum(3).tolist() == report(40).layers[0].singular_values.tolist()
        assert read == ["singular_values"], "one row of one file"
        assert opened["encoder.0"].singular_values.shape == (4, 5)


def test_all_layers_in_one_table(run: Path) -> None:
    with spectra.open(run) as opened:
        events = opened.events
        assert len(events) == 2 * 4 + 3 * 3
        assert events["layer"].tolist() == [0] * 4 + [1] * 4 + [2] * 3 + [3] * 3 + [4] * 3
        assert (events["t"] == np.concatenate([layer.t for layer in opened.values()])).all()


def test_pandas(run: Path) -> None:
    with spectra.open(run / "spectra.h5") as opened:
        table = opened.to_pandas(singular_values=True)
        assert list(table.columns) == ["layer", *(EVENT.names or ()), "singular_values"]
        last = table[(table.layer == "encoder.0") & (table.t == 40)].iloc[0]
        assert last.kind == "update"
        assert last.singular_values.tolist() == opened["encoder.0"].spectrum(3).tolist()
        assert opened.to_pandas("steps").loss.tolist() == [1 / 10, 1 / 20, 1 / 30]
        with pytest.raises(UnknownNameError, match="unknown table 'all'; valid: events, steps"):
            opened.to_pandas("all")


def test_xarray(run: Path) -> None:
    with spectra.open(run) as opened:
        data = opened.to_xarray()
        assert dict(data.sizes) == {"layer": 5, "t": 4, "index": 5, "step": 3}
        assert data.r.sel(layer="encoder.0").values.tolist() == [3, 3, 3, 3]
        assert np.isnan(data.r.sel(layer=".", t=40))
        assert data.kind.sel(layer=".").values.tolist() == [*KINDS.values(), -1]
        one = data.singular_values.sel(layer="head/out", t=30).values
        assert np.array_equal(one, opened["head/out"].singular_values[2], equal_nan=True)
        assert opened.to_xarray("head*").layer.values.tolist() == ["head/out"]
        with pytest.raises(DataError, match=r"has no layer like 'x\*'; it has encoder.0, head/out"):
            opened.to_xarray("x*")


def test_several_runs_side_by_side(run: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    writer = writer_of(second / "spectra.h5")
    writer.write(report(30, names=("encoder.0", "other")))
    writer.close()
    with spectra.open([run, second]) as runs:
        assert list(runs) == [run.name, "second"]
        assert runs.layers == (*NAMES, "other")
        table = runs.to_pandas()
        assert table.columns[0] == "run"
        assert table.groupby("run").size().to_dict() == {run.name: 17, "second": 2}
        data = runs.to_xarray()
        assert data.sizes["run"] == 2
        assert data.r.sel(run="second", layer="other", t=30) == 3
        assert np.isnan(data.r.sel(run="second", layer="head/out", t=30))
        with pytest.raises(UnknownNameError, match="unknown run 'third'"):
            runs["third"]
    with spectra.open((run, run / "spectra.h5")) as runs:
        assert list(runs) == [str(run), str(run / "spectra.h5")]
    with pytest.raises(DataError, match="no run was given"):
        spectra.open([])


@pytest.mark.parametrize(
    ("package", "use"),
    [("pandas", lambda r: r.to_pandas()), ("xarray", lambda r: r.to_xarray())],
    ids=["pandas", "xarray"],
)
def test_a_missing_package_is_named(run: Path, monkeypatch: pytest.MonkeyPatch, package: str, use: Any) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with (
        spectra.open(run) as opened,
        pytest.raises(MissingExtraError, match=rf"needs {package}. .* pip install 'hpc_oialr\[spectra\]'"),
    ):
        use(opened)


def test_unknown_names(run: Path) -> None:
    with spectra.open(run) as opened:
        with pytest.raises(
            UnknownNameError, match=r"unknown layer 'encoder.1' \(from .*\); .* Did you mean 'encoder.0'"
        ):
            opened["encoder.1"]
        with pytest.raises(
            UnknownNameError, match="unknown field of events 'stable rank'.* Did you mean 'stable_rank'"
        ):
            opened["encoder.0"]["stable rank"]


def test_no_record(tmp_path: Path) -> None:
    for path in (tmp_path / "spectra.h5", tmp_path):
        with pytest.raises(DataError, match=r"spectra.h5 does not exist; must be the spectra.h5 of a run"):
            spectra.open(path)
    with pytest.raises(DataError, match=r"nothing.h5 does not exist; must be the spectra.h5 of a run"):
        spectra.open(tmp_path / "nothing.h5")


@pytest.mark.parametrize("joined_before", [0, 2])
def test_files_are_joined_while_they_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joined_before: int
) -> None:
    """Those that it has listed are gone, or hold newer rows: it looks again."""
    writer = writer_of(tmp_path / "spectra.h5", join={"join_flushes": 4})
    for t in range(1, 4 * joined_before + 2):
        writer.write(report(t), wait=True)
    opened: list[Path] = []

    def slow(path: Path) -> Any:
        file = RecordFile(path)
        if not opened:
            last = 4 * joined_before + 1
            for t in range(last + 1, last + 5):
                writer.write(report(t), wait=True)
        opened.append(path)
        return file

    monkeypatch.setattr(reader, "RecordFile", slow)
    with spectra.open(tmp_path) as run:
        assert run["encoder.0"].t.tolist() == list(range(1, 4 * joined_before + 6))
    assert len(opened) > 2


def test_merging_a_whole_record_changes_nothing(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "spectra.h5"
    writer = writer_of(path)
    writer.write(report(1))
    writer.finish()
    before = path.read_bytes()
    merge(tmp_path)
    assert path.read_bytes() == before


def test_export(run: Path, tmp_path: Path) -> None:
    pandas = importlib.import_module("pandas")
    with spectra.open(run) as opened:
        written = export(opened, "csv", tmp_path / "csv")
    assert [path.name for path in written] == ["events.csv", "steps.csv", "singular_values.csv"]
    files = sorted(path.name for path in (tmp_path / "csv").iterdir())
    assert files == sorted([*(path.name for path in written), "written_by_oialr.json"])
    events, steps, values = (pandas.read_csv(path, keep_default_na=False) for path in written)
    with spectra.open(run) as opened:
        assert len(events) == len(opened.events)
        assert steps.step.tolist() == [10, 20, 30]
        mine = values[(values.layer == "head/out") & (values.t == 40)]
        assert mine["index"].tolist() == [0, 1, 2, 3]
        assert np.float32(mine.value.astype(float)).tolist() == opened["head/out"].spectrum(3).tolist()
        parquet = [pandas.read_parquet(path) for path in export(opened, "parquet", tmp_path / "parquet")]
        assert parquet[0].t.tolist() == opened.events["t"].tolist()
        assert parquet[0].singular_values[3].tolist() == opened["encoder.0"].spectrum(3).tolist()
        with pytest.raises(UnknownNameError, match="unknown format 'xml'; valid: csv, parquet"):
            export(opened, "xml")


def test_opening_twice_gives_the_same(run: Path) -> None:
    assert content(run) == content(run / "spectra.h5")


def test_reading_takes_no_torch(run: Path) -> None:
    """On a login node, where importing torch takes half a minute."""
    script = "import sys, hpc_oialr.spectra as s; print(len(s.open(sys.argv[1])), 'torch' in sys.modules)"
    command = [sys.executable, "-W", "error", "-c", script, str(run)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["5", "False"]


@pytest.mark.parametrize("version", [SCHEMA_VERSION - 1, SCHEMA_VERSION + 1])
def test_another_version_is_refused(tmp_path: Path, version: int) -> None:
    writer = writer_of(tmp_path / "spectra.h5")
    writer.write(report(1))
    writer.finish()
    writer.close()
    with h5py.File(tmp_path / "spectra.h5", "a") as file:
        file.attrs["schema_version"] = version
    with pytest.raises(DataError, match=rf"schema version {version}; must be {SCHEMA_VERSION}"):
        spectra.open(tmp_path)
