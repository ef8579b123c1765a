"""``oialr spectra``, as it is typed."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path

import pytest
from support.spectra_reports import SEGMENTS, report, step_row, steps_in, writer_of

from hpc_oialr.cli import command_spectra
from hpc_oialr.cli.main import main
from hpc_oialr.record import MetricsWriter, RunFolder
from hpc_oialr.record.owner import Claim


@pytest.fixture
def run(tmp_path: Path) -> Path:
    writer = writer_of(tmp_path / "run" / "spectra.h5", join=SEGMENTS)
    writer.chain.head.parent.mkdir()
    for t in (10, 20):
        writer.write(report(t), wait=True)
        writer.add_steps(step_row(t))
    writer.close()
    return tmp_path / "run"


def test_show(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spectra", "show", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "5 layers, 10 rows, step 20, loss 0.0500" in shown
    line = next(line for line in shown.splitlines() if "encoder.0" in line)
    assert line.split()[:7] == ["encoder.0", "5", "3", "60.0%", "2", "20", "0.500"]
    assert main(["spectra", "show", str(run), "--layers", "head*"]) == 0
    shown = capsys.readouterr().out
    assert "head/out" in shown
    assert "encoder.0" not in shown


def test_export(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spectra", "export", str(run), "--format", "parquet"]) == 0
    files = [Path(line) for line in capsys.readouterr().out.split()]
    assert [file.name for file in files] == ["events.parquet", "steps.parquet"]
    assert all(file.parent == run / "spectra_parquet" and file.exists() for file in files)


def test_merge(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted(run.iterdir())
    assert len(files) > 1

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr("hpc_oialr.spectra.store.write_record", full)
        assert main(["spectra", "merge", str(run)]) == 2
    error = capsys.readouterr().err
    assert f"{run} cannot be merged ([Errno 28] No space left on device); all files are as before." in error
    assert sorted(run.iterdir()) == files
    assert main(["spectra", "merge", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "spectra.h5")
    assert [file.name for file in run.iterdir()] == ["spectra.h5"]


def test_a_run_that_goes_on_is_not_merged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(run)
    folder.write_config("seed: 0\n")
    files = sorted(run.iterdir())
    with closing(Claim("oialr train").take(folder)):
        assert main(["spectra", "merge", str(run)]) == 2
    assert f"{run} is in use by process" in capsys.readouterr().err
    assert sorted(run.iterdir()) == files
    assert main(["spectra", "merge", str(run), "--copy"]) == 0
    assert [file.name for file in run.glob("spectra*")] == ["spectra.h5"]


def test_damage_and_repair(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    segment = run / "spectra.h5.001"
    segment.write_bytes(segment.read_bytes()[:-500])
    assert main(["spectra", "show", str(run)]) == 2
    error = capsys.readouterr().err
    assert f"oialr: error: {segment} is damaged" in error
    assert f"oialr spectra repair {run / 'spectra.h5'}" in error
    assert main(["spectra", "repair", str(run), "--out", str(run / "saved.h5")]) == 0
    said = capsys.readouterr().out
    assert "lost: spectra.h5.001: all of it (" in said
    assert f"rows of events of 5 layers, in {run / 'saved.h5'}" in said
    assert steps_in(run / "saved.h5") == [10]


def test_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spectra", "show", str(tmp_path)]) == 2
    assert f"{tmp_path / 'spectra.h5'} does not exist; must be the spectra.h5 of a run." in capsys.readouterr().err


def test_watch_follows_a_run_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path / "run").create()
    metrics = MetricsWriter(folder.metrics)
    writer = writer_of(folder.spectra)
    looks = iter(command_spectra.frames(folder.path, "*", 0.0))
    assert str(next(looks)).endswith("must be the spectra.h5 of a run.")
    writer.write(report(10), wait=True)
    metrics.write({"step": 14, "loss": 0.75})
    assert getattr(next(looks), "title", "") == f"{folder.path}, 5 layers, 5 rows, step 14, loss 0.7500"
    writer.write(report(20), wait=True)
    assert ", 10 rows, step 14" in getattr(next(looks), "title", "")
    metrics.close()
    threading.Timer(0.1, lambda: folder.write_summary({})).start()
    assert main(["spectra", "watch", str(folder.path), "--every", "0.02"]) == 0
    assert "encoder.0" in capsys.readouterr().out
