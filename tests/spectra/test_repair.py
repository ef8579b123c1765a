"""Damaged records: a clear error, and what can be saved is saved."""

from __future__ import annotations

import random
from pathlib import Path

import h5py
import numpy as np
import pytest
from support.spectra_reports import ATTRIBUTES, content, report, step_row, writer_of

from hpc_oialr.errors import DataError
from hpc_oialr.spectra import open
from hpc_oialr.spectra.schema import group_name
from hpc_oialr.spectra.store import repair
from hpc_oialr.spectra.writer import SpectraWriter

LAST, K = 70, 40
LAYER = f"layers/{group_name('encoder.0')}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "spectra.h5"
    write(path).finish()
    return path


def write(path: Path) -> SpectraWriter:
    writer = writer_of(path)
    for t in range(1, LAST + 1):
        writer.write(report(t, k=K))
        writer.add_steps(step_row(t))
    return writer


def damaged(whole: Path, folder: Path, content: bytes) -> Path:
    path = folder / whole.name
    path.write_bytes(content)
    return path


def address(whole: Path, dataset: str, row: int) -> int:
    """A byte in the middle of the chunk that holds a row."""
    with open(whole) as run:
        table = run.files[0].tree[dataset]
        chunk = table.id.get_chunk_info_by_coord((row,) + (0,) * (table.ndim - 1))
        return int(chunk.byte_offset + chunk.size // 2)


def flipped(whole: Path, at: int) -> bytes:
    data = bytearray(whole.read_bytes())
    data[at] ^= 4
    return bytes(data)


def test_a_record_that_is_whole(whole: Path, tmp_path: Path) -> None:
    result = repair(damaged(whole, tmp_path, whole.read_bytes()))
    assert (result.layers, result.events, result.lost) == (5, 5 * LAST, ())
    assert result.target == tmp_path / "spectra.h5.repaired.h5"
    assert content(result.target) == content(whole)
    with open(result.target) as run:
        assert run.attributes["seed"] == ATTRIBUTES["seed"]


def test_a_damaged_chunk_of_singular_values(whole: Path, tmp_path: Path) -> None:
    path = damaged(whole, tmp_path, flipped(whole, address(whole, f"{LAYER}/singular_values", 50)))
    with open(path) as run:
        assert len(run["head/out"].singular_values) == LAST, "other layers can be read"
        assert len(run["encoder.0"]) == LAST
        with pytest.raises(
            DataError,
            match=rf"{path}: data set {LAYER}/singular_values cannot be read; it is damaged \(.*\)\. "
            rf"Save the rest with: oialr spectra repair {path}",
        ):
            _ = run["encoder.0"].singular_values
    result = repair(path)
    assert result.events == 5 * LAST, "its events are all there"
    with open(result.target) as run, open(whole) as before:
        lost = np.isnan(run["encoder.0"].singular_values).all(axis=1)
        assert lost[50]
        assert 1 <= lost.sum() <= 32
        assert result.lost == (f"spectra.h5: layer 'encoder.0', the singular values of {lost.sum()} of {LAST} events.",)
        kept, all_values = run["encoder.0"].singular_values[~lost], before["encoder.0"].singular_values
        assert np.array_equal(kept, all_values[~lost], equal_nan=True)
        assert run.events.tobytes() == before.events.tobytes()


def test_a_damaged_chunk_of_events(whole: Path, tmp_path: Path) -> None:
    path = damaged(whole, tmp_path, flipped(whole, address(whole, f"{LAYER}/events", 5)))
    with open(path) as run, pytest.raises(DataError, match=f"data set {LAYER}/events cannot be read"):
        len(run["encoder.0"])
    result = repair(path)
    assert result.lost == (f"spectra.h5: layer 'encoder.0', 32 of {LAST} events.",)
    assert result.events == 5 * LAST - 32
    with open(result.target) as run, open(whole) as before:
        assert run["encoder.0"].t.tolist() == list(range(33, LAST + 1))
        assert run["head/out"].singular_values.tobytes() == before["head/out"].singular_values.tobytes()
        assert np.array_equal(
            run["encoder.0"].singular_values, before["encoder.0"].singular_values[32:], equal_nan=True
        )


@pytest.mark.parametrize("at", [4, 9, 30, 46, 60], ids=lambda at: f"byte{at}")
def test_a_file_that_cannot_be_opened_is_lost_alone(whole: Path, tmp_path: Path, at: int) -> None:
    """The first bytes, on which everything else hangs; and files that were cut short."""
    damaged(whole, tmp_path, flipped(whole, at))
    (tmp_path / "spectra.h5.001").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    more = writer_of(tmp_path / "spectra.h5")
    more.write(report(LAST + 1, k=K), wait=True)
    with pytest.raises(DataError, match="spectra.h5 is damaged or no spectra file"):
        open(tmp_path)
    result = repair(tmp_path)
    assert [sentence.partition(" (")[0] for sentence in result.lost] == [
        "spectra.h5: all of it",
        "spectra.h5.001: all of it",
    ]
    with open(result.target) as run:
        assert [layer.t.tolist() for layer in run.values()] == [[LAST + 1]] * 5


@pytest.mark.parametrize("kind", ["joined", "flush"])
def test_any_flipped_bit_is_seen_and_never_read_as_a_number(whole: Path, tmp_path: Path, kind: str) -> None:
    if kind == "flush":
        writer_of(tmp_path / "flush.h5").write(report(1, k=K), wait=True)
        whole = tmp_path / "flush.h5.000.npz"
    data, chance, seen = whole.read_bytes(), random.Random(0), 0
    expected, reasons = content(whole), list[str]()
    (tmp_path / "damaged").mkdir()
    with open(whole) as before:
        for _ in range(24):
            path = damaged(whole, tmp_path / "damaged", flipped(whole, chance.randrange(len(data))))
            try:
                assert content(path) == expected, "free space"
                continue
            except DataError:
                seen += 1
            try:
                target = repair(path).target
            except DataError as error:
                reasons.append(str(error))
                continue
            assert kind == "joined", "a flush is read as a whole or not at all"
            with open(target) as run:
                for name, layer in run.items():
                    rows = np.isin(before[name].t, layer.t)
                    assert layer.events.tobytes() == before[name].events[rows].tobytes()
    assert seen > 2
    assert all("all of it" in reason for reason in reasons)


@pytest.mark.parametrize("name", ["layers", "steps"])
def test_a_damaged_header_is_no_missing_table(whole: Path, tmp_path: Path, name: str) -> None:
    with h5py.File(whole) as file:
        header = h5py.h5o.get_info(file[name].id).addr
    path = damaged(whole, tmp_path, flipped(whole, header + 12))
    with pytest.raises(DataError, match="is damaged"):
        content(path)
    if name == "layers":
        with pytest.raises(DataError, match="nothing of .* can be saved: spectra.h5: all of it"):
            repair(path)
    else:
        assert repair(path).lost == ("spectra.h5: the table of steps, all of it.",)


def test_a_chain_with_a_gap_and_a_damaged_flush(tmp_path: Path) -> None:
    writer = writer_of(tmp_path / "spectra.h5", join={"join_flushes": 3})
    for t in range(1, 9):
        writer.write(report(t, k=K), wait=True)
    gap, flush = tmp_path / "spectra.h5.001.npz", tmp_path / "spectra.h5.002.npz"
    gap.unlink()
    flush.write_bytes(flush.read_bytes()[:200])
    result = repair(tmp_path)
    assert result.target == tmp_path / "spectra.h5.repaired.h5"
    assert result.lost == (
        f"{gap.stem}: it is missing.",
        f"{flush.name}: all of it (File is not a zip file).",
    )
    with open(result.target) as run:
        assert run["encoder.0"].t.tolist() == [1, 2, 3, 4, 5, 6]
    with pytest.raises(DataError, match=r"nothing of .*spectra.h5 can be saved: .*npz: all of it"):
        repair(flush)


@pytest.mark.parametrize("data", [b"", b"no HDF5 file at all" * 100], ids=["empty", "text"])
def test_nothing_to_be_saved(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "spectra.h5"
    with pytest.raises(DataError, match="nothing of .* can be saved: there is no such file"):
        repair(path)
    path.write_bytes(data)
    with pytest.raises(DataError, match="can be saved: spectra.h5: all of it"):
        repair(path)
    assert [file.name for file in tmp_path.iterdir()] == ["spectra.h5"]
