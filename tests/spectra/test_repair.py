"""Damaged records: a clear error, and what can be saved is saved."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from support.spectra_reports import ATTRIBUTES, NAMES, content, report, step_row, writer_of

from hpc_oialr.errors import DataError
from hpc_oialr.spectra import open
from hpc_oialr.spectra.names import part_path
from hpc_oialr.spectra.repair import repair
from hpc_oialr.spectra.schema import group_name

LAST, K = 70, 40
LAYER = f"layers/{group_name('encoder.0')}"


@pytest.fixture(scope="module", params=["joined", "head"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record as it grows, and as it is at a run's end."""
    path = tmp_path_factory.mktemp("whole") / "spectra.h5"
    write(path)
    if request.param == "joined":
        writer = writer_of(path)
        writer.store.main.head_bytes = 1
        writer.write(report(LAST + 1, k=K), wait=True)
        writer.truncate_after(LAST)
        writer.finish()
    return path


def write(path: Path, head_bytes: int = 2**23) -> None:
    writer = writer_of(path, head_bytes=head_bytes)
    for t in range(1, LAST + 1):
        writer.write(report(t, k=K))
        writer.add_steps(step_row(t))
    writer.close()


def damaged(whole: Path, folder: Path, content: bytes) -> Path:
    path = folder / whole.name
    path.write_bytes(content)
    return path


def address(whole: Path, dataset: str, row: int) -> int:
    """A byte in the middle of the chunk that holds a row."""
    with open(whole) as run:
        table = run.pieces[0].file[dataset]
        chunk = table.id.get_chunk_info_by_coord((row,) + (0,) * (table.ndim - 1))
        return int(chunk.byte_offset + chunk.size // 2)


def flipped(whole: Path, at: int) -> bytes:
    data = bytearray(whole.read_bytes())
    data[at] ^= 4
    return bytes(data)


def test_a_record_that_is_whole(whole: Path, tmp_path: Path) -> None:
    salvage = repair(damaged(whole, tmp_path, whole.read_bytes()))
    assert (salvage.layers, salvage.events, salvage.lost) == (5, 5 * LAST, ())
    assert salvage.target == tmp_path / "spectra.h5.repaired.h5"
    assert content(salvage.target) == content(whole)
    with open(salvage.target) as run:
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
    salvage = repair(path)
    assert salvage.events == 5 * LAST, "its events are all there"
    with open(salvage.target) as run, open(whole) as before:
        lost = np.isnan(run["encoder.0"].singular_values).all(axis=1)
        assert lost[50]
        assert 1 <= lost.sum() <= 32
        assert salvage.lost == (
            f"spectra.h5: layer 'encoder.0', the singular values of {lost.sum()} of {LAST} events.",
        )
        kept, all_values = run["encoder.0"].singular_values[~lost], before["encoder.0"].singular_values
        assert np.array_equal(kept, all_values[~lost], equal_nan=True)
        assert run.events.tobytes() == before.events.tobytes()


def test_a_damaged_chunk_of_events(whole: Path, tmp_path: Path) -> None:
    path = damaged(whole, tmp_path, flipped(whole, address(whole, f"{LAYER}/events", 5)))
    with open(path) as run, pytest.raises(DataError, match=f"data set {LAYER}/events cannot be read"):
        len(run["encoder.0"])
    salvage = repair(path)
    assert salvage.lost == (f"spectra.h5: layer 'encoder.0', 32 of {LAST} events.",)
    assert salvage.events == 5 * LAST - 32
    with open(salvage.target) as run, open(whole) as before:
        assert run["encoder.0"].t.tolist() == list(range(33, LAST + 1))
        assert run["head/out"].singular_values.tobytes() == before["head/out"].singular_values.tobytes()
        assert np.array_equal(
            run["encoder.0"].singular_values, before["encoder.0"].singular_values[32:], equal_nan=True
        )


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_file_that_was_cut_short(whole: Path, tmp_path: Path, share: float) -> None:
    data = whole.read_bytes()
    path = damaged(whole, tmp_path, data[: int(share * len(data))])
    with pytest.raises(DataError, match=rf"{path} is damaged .*truncated.* oialr spectra repair {path}"):
        open(path)
    salvage = repair(path)
    assert salvage.events > 0
    with open(salvage.target) as run, open(whole) as before:
        for name, layer in run.items():
            rows = np.isin(before[name].t, layer.t)
            assert layer.events.tobytes() == before[name].events[rows].tobytes(), "what is read is right"
            known = ~np.isnan(layer.singular_values).all(axis=1)
            right = before[name].singular_values[rows]
            assert np.array_equal(layer.singular_values[known], right[known], equal_nan=True)


@pytest.mark.parametrize("at", [4, 9, 13, 30, 46, 52, 60], ids=lambda at: f"byte{at}")
def test_a_damaged_superblock_or_root(whole: Path, tmp_path: Path, at: int) -> None:
    """The first bytes, on which everything else hangs."""
    path = damaged(whole, tmp_path, flipped(whole, at))
    with pytest.raises(DataError, match="is damaged or no spectra file"):
        open(path)
    salvage = repair(path)
    assert salvage.events == 5 * LAST
    with open(salvage.target) as run, open(whole) as before:
        assert run.layers == NAMES
        assert run.events.tobytes() == before.events.tobytes()
        assert run.steps.tobytes() == before.steps.tobytes()


def test_any_flipped_bit_is_seen_and_never_read_as_a_number(whole: Path, tmp_path: Path) -> None:
    data, chance, seen = whole.read_bytes(), random.Random(0), 0
    expected = content(whole)
    with open(whole) as before:
        for _ in range(12):
            path = damaged(whole, tmp_path, flipped(whole, chance.randrange(len(data))))
            try:
                assert content(path) == expected, "free space"
                continue
            except DataError:
                seen += 1
            with open(repair(path).target) as run:
                for name, layer in run.items():
                    rows = np.isin(before[name].t, layer.t)
                    assert layer.events.tobytes() == before[name].events[rows].tobytes()
    assert seen > 2


def test_segments_and_the_files_of_processes(tmp_path: Path) -> None:
    path = tmp_path / "spectra.h5"
    write(part_path(path, 0), head_bytes=100_000)
    segment = tmp_path / "spectra.p0000.h5.001"
    assert segment.exists()
    segment.write_bytes(segment.read_bytes()[:200])
    with pytest.raises(DataError, match=f"{segment} is damaged"):
        open(tmp_path)
    salvage = repair(tmp_path)
    assert salvage.target == tmp_path / "spectra.h5.repaired.h5"
    assert salvage.lost == (
        "spectra.p0000.h5.001: the list of layers; they were looked for one by one.",
        "spectra.p0000.h5.001: the table of steps, all of it.",
    )
    with open(salvage.target) as run:
        steps = run["encoder.0"].t.tolist()
        assert steps == list(range(steps[0], LAST + 1))
        assert 1 < steps[0] < LAST
    with pytest.raises(
        DataError, match="nothing of .*001 can be saved: spectra.p0000.h5.001: the list of layers"
    ):
        repair(segment)


@pytest.mark.parametrize("data", [b"", b"no HDF5 file at all" * 100], ids=["empty", "text"])
def test_nothing_to_be_saved(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "spectra.h5"
    with pytest.raises(DataError, match="nothing of .* can be saved: there is no such file"):
        repair(path)
    path.write_bytes(data)
    with pytest.raises(DataError, match="can be saved: spectra.h5: all of it: it is no HDF5 file any more"):
        repair(path)
    assert [file.name for file in tmp_path.iterdir()] == ["spectra.h5"]
