"""Reading: lazily, from files of all versions, as tables and arrays, one run or several, and clear errors."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from support.spectra_reports import NAMES, content, report, step_row, writer_of

import hpc_oialr.spectra as spectra
from hpc_oialr.errors import DataError, MissingExtraError, UnknownNameError
from hpc_oialr.spectra.export import export
from hpc_oialr.spectra.merge import merge
from hpc_oialr.spectra.pieces import Piece
from hpc_oialr.spectra.schema import EVENT, KINDS, SCHEMA_VERSION

VERSION_1 = np.dtype([(name, EVENT[name]) for name in (EVENT.names or ())[:9]])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    writer = writer_of(folder / "spectra.h5", head_bytes=1)
    for t, kind in ((10, "stability"), (20, "conversion"), (30, "update")):
        writer.write(report(t, kind))
        writer.add_steps(step_row(t))
    writer.write(report(40, names=NAMES[:2]))
    writer.close()
    return folder


def test_only_what_is_asked_for_is_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = Piece.read

    def counted(piece: Piece, dataset: str, rows: Any = ()) -> Any:
        read.append(dataset.rsplit("/", 1)[-1])
        return original(piece, dataset, rows)

    monkeypatch.setattr(Piece, "read", counted)
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
def test_a_missing_package_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, package: str, use: Any
) -> None:
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


def version_1(path: Path) -> None:
    """A file as the first version of the schema had it."""
    with h5py.File(path, "w", libver="v110") as file:
        file.attrs.update(
            {"schema_version": 1, "config": json.dumps({"beta": 0.2}), "seed": 7, "world_size": 1}
        )
        group = file.create_group("layers", track_order=True).create_group("encoder.0")
        group.attrs.update({"name": "encoder.0", "m": 6, "n": 5, "k": 5})
        rows = np.zeros(2, dtype=VERSION_1)
        rows["t"], rows["r"], rows["stability"] = [10, 20], 3, 0.5
        events = {"maxshape": (None,), "chunks": (32,), "fletcher32": True}
        group.create_dataset("events", data=rows, **events)
        values = np.float32([[4, 2, 1, np.nan, np.nan], [4, 1, 1, 1, np.nan]])
        group.create_dataset(
            "singular_values", data=values, maxshape=(None, 5), chunks=(1, 5), compression="gzip"
        )


def test_version_1_stays_readable_and_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "spectra.h5"
    version_1(path)
    with spectra.open(path) as run:
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
    with spectra.open(path) as run:
        assert run.attributes["schema_version"] == SCHEMA_VERSION
        layer = run["encoder.0"]
        assert layer.t.tolist() == [10, 20]
        assert layer["stable_rank"][0] == pytest.approx(21 / 16), (
            "told from the singular values when files are joined"
        )
        assert layer["condition_number"][0] == 4


def test_missing_and_newer_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing.h5 does not exist; must be the spectra.h5 of a run"):
        spectra.open(tmp_path / "nothing.h5")
    with pytest.raises(DataError, match=r"spectra.h5 does not exist; must be the spectra.h5 of a run"):
        spectra.open(tmp_path)
    path = tmp_path / "spectra.h5"
    version_1(path)
    with h5py.File(path, "a") as file:
        file.attrs["schema_version"] = SCHEMA_VERSION + 1
    with pytest.raises(
        DataError, match=rf"schema version {SCHEMA_VERSION + 1}; must be at most {SCHEMA_VERSION}"
    ):
        spectra.open(path)


def test_a_merge_is_not_disturbed_by_a_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written while files are joined is in the joined file."""
    path = tmp_path / "spectra.h5"
    writer = writer_of(path, head_bytes=1)
    for t in (1, 2, 3):
        writer.write(report(t), wait=True)
    module = importlib.import_module("hpc_oialr.spectra.merge")
    write_record, late = module.write_record, iter([4, 5])

    def meanwhile(*arguments: Any, **options: Any) -> bool:
        for t in late:
            writer.write(report(t), wait=True)
            break
        return bool(write_record(*arguments, **options))

    monkeypatch.setattr(module, "write_record", meanwhile)
    merge(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["spectra.h5"]
    with spectra.open(tmp_path) as run:
        assert run["encoder.0"].t.tolist() == [1, 2, 3, 4, 5]
    writer.write(report(6), wait=True)
    with spectra.open(tmp_path) as run:
        assert run["encoder.0"].t.tolist() == [1, 2, 3, 4, 5, 6]


def test_merging_a_whole_record_changes_nothing(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "spectra.h5"
    writer = writer_of(path)
    writer.write(report(1))
    writer.close()
    before = path.read_bytes()
    merge(tmp_path)
    assert path.read_bytes() == before


def test_export(run: Path, tmp_path: Path) -> None:
    pandas = importlib.import_module("pandas")
    written = export(run, "csv", tmp_path / "csv")
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
        parquet = [pandas.read_parquet(path) for path in export(run, "parquet", tmp_path / "parquet")]
        assert parquet[0].t.tolist() == opened.events["t"].tolist()
        assert parquet[0].singular_values[3].tolist() == opened["encoder.0"].spectrum(3).tolist()
    with pytest.raises(UnknownNameError, match="unknown format 'xml'; valid: csv, parquet"):
        export(run, "xml")


def test_opening_twice_gives_the_same(run: Path) -> None:
    assert content(run) == content(run / "spectra.h5")
