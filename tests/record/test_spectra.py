"""The spectra's file: what is written comes back, nothing is doubled, nothing is lost, nothing stops a run."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from hpc_oialr.errors import DataError
from hpc_oialr.method.report import Kind, LayerUpdate, UpdateReport
from hpc_oialr.record.spectra import SpectraWriter, read_attributes, read_spectra
from hpc_oialr.record.spectra_schema import SCHEMA_VERSION, LayerSpectra

NAMES = ("encoder.0", "head/out", ".", "", "größe %")


def report(t: int, kind: Kind = "update", names: tuple[str, ...] = NAMES) -> UpdateReport:
    generator = torch.Generator().manual_seed(t)
    layers = tuple(
        LayerUpdate(
            name=name,
            m=6 + i,
            n=5,
            r_before=4,
            r=3,
            singular_values=torch.rand(4, generator=generator),
            stability=None if kind == "conversion" else 0.5,
            orthogonality_error_U=1e-7 * t,
            orthogonality_error_Vh=2e-7,
            seconds=0.25,
        )
        for i, name in enumerate(names)
    )
    return UpdateReport(t=t, kind=kind, layers=layers, seconds=1.0, bytes_sent=10)


def equal(first: dict[str, LayerSpectra], second: dict[str, LayerSpectra]) -> bool:
    return list(first) == list(second) and all(
        np.array_equal(getattr(first[name], field), getattr(second[name], field), equal_nan=True)
        for name in first
        for field in ("t", "kind", "r", "stability", "orthogonality_error_U", "singular_values")
    )


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "spectra.h5"
    writer = SpectraWriter(path, {"config": {"beta": 0.1}, "seed": 3, "world_size": 2})
    events = [report(5, "stability"), report(10, "conversion"), report(20)]
    for event in events:
        writer.write(event)
    layers = read_spectra(path)
    assert list(layers) == list(NAMES), "in the model's order, under their own names"
    layer = layers["head/out"]
    assert (layer.m, layer.n) == (7, 5)
    assert layer.t.tolist() == [5, 10, 20]
    assert layer.kinds == ["stability", "conversion", "update"]
    assert layer.r_before.tolist() == [4, 4, 4]
    assert layer.r.tolist() == [3, 3, 3]
    assert layer.cut_values.tolist() == [1, 1, 1]
    assert layer.stability[[0, 2]].tolist() == [0.5, 0.5]
    assert np.isnan(layer.stability[1])
    assert layer.orthogonality_error_U.tolist() == [event.layers[1].orthogonality_error_U for event in events]
    assert layer.orthogonality_error_Vh.tolist() == [2e-7] * 3
    assert layer.seconds.tolist() == [0.25] * 3
    assert layer.singular_values.shape == (3, 5)
    assert np.isnan(layer.singular_values[:, 4]).all(), "padded to k"
    for row, event in zip(layer.singular_values, events, strict=True):
        assert row[:4].tolist() == event.layers[1].singular_values.tolist()
    assert read_attributes(path) == {
        "schema_version": SCHEMA_VERSION,
        "config": '{"beta": 0.1}',
        "seed": 3,
        "world_size": 2,
    }


def test_any_hdf5_reader_understands_it(tmp_path: Path) -> None:
    path = tmp_path / "spectra.h5"
    SpectraWriter(path).write(report(5, "conversion", ("a.b",)))
    with h5py.File(path, "r") as file:
        events = file["layers/a.b/events"]
        assert h5py.check_enum_dtype(events.dtype["kind"]) == {"stability": 0, "conversion": 1, "update": 2}
        assert events["r"].tolist() == [3]
        assert file["layers/a.b/singular_values"].dtype == np.float32
        assert file["layers/a.b"].attrs["k"] == 5


def test_layers_may_come_later(tmp_path: Path) -> None:
    writer = SpectraWriter(tmp_path / "spectra.h5")
    writer.write(report(1, names=("late",)))
    writer.write(report(2, names=("late", "later")))
    layers = read_spectra(writer.path)
    assert layers["late"].t.tolist() == [1, 2]
    assert layers["later"].t.tolist() == [2]


def test_resume_doubles_nothing(tmp_path: Path) -> None:
    straight, resumed = SpectraWriter(tmp_path / "a.h5"), SpectraWriter(tmp_path / "b.h5")
    for t in (5, 10, 15, 20):
        straight.write(report(t))
    for t in (5, 10, 15):
        resumed.write(report(t))
    again = SpectraWriter(tmp_path / "b.h5")
    again.truncate_after(12)
    assert read_spectra(again.path)["."].t.tolist() == [5, 10]
    for t in (15, 20):
        again.write(report(t))
    assert equal(read_spectra(straight.path), read_spectra(again.path))


def test_a_reader_keeps_its_picture_while_the_run_goes_on(tmp_path: Path) -> None:
    writer = SpectraWriter(tmp_path / "spectra.h5")
    writer.write(report(1))
    with h5py.File(writer.path, "r") as file:
        writer.write(report(2))
        assert file["layers/encoder.0/events"]["t"].tolist() == [1]
    assert read_spectra(writer.path)["encoder.0"].t.tolist() == [1, 2]


@pytest.mark.parametrize("damage", ["truncated", "empty", "bit", "text"])
def test_a_damaged_file_is_moved_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    path = tmp_path / "spectra.h5"
    SpectraWriter(path).write(report(1))
    content = bytearray(path.read_bytes())
    values = report(1).layers[0].singular_values.numpy().tobytes()
    assert values not in content, "compressed"
    if damage == "bit":
        seconds = np.float64(1e-7).tobytes()
        content[content.index(seconds)] ^= 1
    path.write_bytes(
        {"truncated": content[: len(content) // 2], "empty": b"", "bit": content}.get(damage, b"no")
    )
    with caplog.at_level(logging.WARNING):
        writer = SpectraWriter(path, {"seed": 4})
    assert "is damaged or no spectra file" in caplog.text
    assert "moved to spectra.h5.damaged1, and a new file begun" in caplog.text
    assert (tmp_path / "spectra.h5.damaged1").exists()
    writer.write(report(2))
    assert read_spectra(path)["encoder.0"].t.tolist() == [2]
    assert read_attributes(path)["seed"] == 4


def test_missing_and_newer_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing.h5 does not exist; must be the spectra.h5 of a run"):
        read_spectra(tmp_path / "nothing.h5")
    path = tmp_path / "spectra.h5"
    SpectraWriter(path)
    with h5py.File(path, "a") as file:
        file.attrs["schema_version"] = SCHEMA_VERSION + 1
    with pytest.raises(
        DataError, match=rf"schema version {SCHEMA_VERSION + 1}; must be at most {SCHEMA_VERSION}"
    ):
        read_spectra(path)


def test_locking_does_not_matter(tmp_path: Path) -> None:
    writer = SpectraWriter(tmp_path / "spectra.h5")
    with h5py.File(writer.path, "a", locking=True):
        writer.write(report(1))
        assert read_spectra(writer.path)["encoder.0"].t.tolist() == [1]


FULL_DISK = """
import resource, sys, logging
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1]).parent))
from test_spectra import SpectraWriter, read_spectra, report
logging.basicConfig()
writer = SpectraWriter(sys.argv[2])
writer.write(report(1))
size = Path(sys.argv[2]).stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
for t in (2, 3, 4):
    writer.write(report(t))
writer.truncate_after(2)
assert writer.failed
print(read_spectra(sys.argv[2])["encoder.0"].t.tolist())
"""


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", script, __file__, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def test_a_full_disk_costs_the_record_and_not_the_run(tmp_path: Path) -> None:
    done = run(FULL_DISK, str(tmp_path / "spectra.h5"))
    assert done.stdout.strip() == "[1]"
    assert done.stderr.count("cannot be written") == 1
    assert "spectra are not recorded any more" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_folder_that_is_not_there_costs_the_record_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = SpectraWriter(tmp_path / "missing" / "spectra.h5")
    writer.write(report(1))
    assert writer.failed
    assert caplog.text.count("cannot be written") == 1


# A child writes events 1, 2, ... and says each one's number when write() has returned; it is killed at a
# random moment. Forked from one parent, so that the twenty children need not import torch again.
KILL = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1]).parent))
import h5py
from test_spectra import NAMES, SpectraWriter, read_spectra, report
path, generator, torn, most = Path(sys.argv[2]), random.Random(0), 0, 0
reports = [report(t) for t in range(1, 400)]
for round in range(20):
    path.unlink(missing_ok=True)
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        writer = SpectraWriter(path)
        for event in reports:
            writer.write(event)
            os.write(sink, event.t.to_bytes(4, "big"))
        os._exit(0)
    os.close(sink)
    os.read(source, 4)
    time.sleep(generator.uniform(0, 0.15))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    told = b""
    while part := os.read(source, 65536):
        told += part
    acknowledged = int.from_bytes(told[-4:], "big") if told else 1
    torn += path.with_name(".spectra.h5.tmp").exists()
    with h5py.File(path, "r") as file:
        assert len(file["layers"]) == len(NAMES)
    for layer in read_spectra(path).values():
        rows = layer.t.tolist()
        assert rows == list(range(1, len(rows) + 1)), rows
        assert acknowledged <= len(rows) <= acknowledged + 1, (acknowledged, len(rows))
    most = max(most, acknowledged)
    resumed = SpectraWriter(path)
    assert not path.with_name("spectra.h5.damaged1").exists()
    resumed.truncate_after(acknowledged)
    resumed.write(report(acknowledged + 1))
    assert read_spectra(path)["."].t.tolist() == list(range(1, acknowledged + 2))
print(torn, most)
"""


def test_kill_at_any_moment_loses_nothing_that_was_written(tmp_path: Path) -> None:
    torn, most = run(KILL, str(tmp_path / "spectra.h5")).stdout.split()
    assert int(torn) > 0, "no kill met a write; the test shows nothing"
    assert int(most) > 3
