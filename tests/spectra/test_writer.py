"""What a run hands over: written in order beside it, counted when it is on the disk, and nothing twice."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from support.spectra_reports import NAMES, SEGMENTS, content, report, step_row, steps_in, writer_of

from hpc_oialr.spectra import open
from hpc_oialr.spectra.schema import SCHEMA_VERSION, group_name
from hpc_oialr.spectra.writer import AsyncWriter


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "spectra.h5"
    writer = writer_of(path)
    events = [report(5, "stability"), report(10, "conversion"), report(20)]
    for event in events:
        writer.write(event)
    for step in (10, 20):
        writer.add_steps(step_row(step))
    assert writer.flush()
    assert writer.written == 3
    with open(path) as run:
        assert run.layers == NAMES, "in the model's order, under their own names"
        layer = run["head/out"]
        assert (layer.m, layer.n, layer.k) == (7, 5, 5)
        assert layer.t.tolist() == [5, 10, 20]
        assert layer.kinds == ["stability", "conversion", "update"]
        assert layer["r_before"].tolist() == [4, 4, 4]
        assert layer.r.tolist() == [3, 3, 3]
        assert layer["cut_values"].tolist() == [1, 1, 1]
        assert layer.stability[[0, 2]].tolist() == [0.5, 0.5]
        assert np.isnan(layer.stability[1])
        assert layer["orthogonality_error_U"].tolist() == [1e-7 * t for t in (5, 10, 20)]
        assert layer["seconds"].tolist() == [0.25] * 3
        assert layer.singular_values.dtype == np.float32
        assert np.isnan(layer.singular_values[:, 4]).all(), "padded to k"
        for row, event in zip(layer.singular_values, events, strict=True):
            s = np.asarray(event.layers[1].singular_values)
            assert row[:4].tolist() == s.tolist()
        assert layer["stable_rank"][2] == pytest.approx((s.astype(float) ** 2).sum() / float(s[0]) ** 2)
        assert layer["condition_number"][2] == pytest.approx(float(s[0]) / float(s[3]))
        assert np.isnan(layer["alpha"]).all()
        assert run.steps["step"].tolist() == [10, 20]
        assert run.steps["loss"].tolist() == [0.1, 0.05]
        assert np.isnan(run.steps["energy_J"]).all()
        assert run.config == {"beta": 0.1}
        assert run.attributes["schema_version"] == SCHEMA_VERSION
        assert run.attributes["seed"] == 3


def test_values_of_a_tensor_that_changes_afterwards(tmp_path: Path) -> None:
    """A report's values may be a view into a buffer that the training goes on to use."""
    buffer = torch.tensor([3.0, 2.0, 1.0, 0.5])
    event = report(1, names=NAMES[:1])
    event = replace(event, layers=(replace(event.layers[0], singular_values=buffer),))
    writer = writer_of(tmp_path / "spectra.h5")
    writer.write(event)
    buffer.zero_()
    writer.close()
    with open(tmp_path) as run:
        assert run["encoder.0"].spectrum(0).tolist() == [3.0, 2.0, 1.0, 0.5]


def test_any_hdf5_reader_understands_it_at_the_end(tmp_path: Path) -> None:
    writer = writer_of(tmp_path / "spectra.h5")
    writer.write(report(5, "conversion"))
    writer.finish()
    with h5py.File(tmp_path / "spectra.h5", "r") as file:
        events = file[f"layers/{group_name('head/out')}/events"]
        assert h5py.check_enum_dtype(events.dtype["kind"]) == {"stability": 0, "conversion": 1, "update": 2}
        assert events["r"].tolist() == [3]
        assert file[f"layers/{group_name('head/out')}"].attrs["k"] == 5


def test_layers_may_come_later(tmp_path: Path) -> None:
    writer = writer_of(tmp_path / "spectra.h5")
    writer.write(report(1, names=("late",)))
    writer.write(report(2, names=("late", "later")), wait=True)
    assert steps_in(tmp_path, "late") == [1, 2]
    assert steps_in(tmp_path, "later") == [2]


def test_resume_doubles_nothing(tmp_path: Path) -> None:
    straight, resumed = writer_of(tmp_path / "a.h5"), writer_of(tmp_path / "b.h5", join=SEGMENTS)
    for t in (5, 10, 15, 20):
        straight.write(report(t))
        straight.add_steps(step_row(t))
    for t in (5, 10, 15):
        resumed.write(report(t))
        resumed.add_steps(step_row(t))
    straight.close()
    resumed.close()
    again = writer_of(tmp_path / "b.h5", join=SEGMENTS)
    again.truncate_after(12)
    assert steps_in(tmp_path / "b.h5") == [5, 10]
    for t in (15, 20):
        again.write(report(t))
        again.add_steps(step_row(t))
    again.finish()
    assert content(tmp_path / "a.h5") == content(tmp_path / "b.h5")


def test_a_reader_keeps_its_picture_while_the_run_goes_on(tmp_path: Path) -> None:
    writer = writer_of(tmp_path / "spectra.h5")
    writer.write(report(1), wait=True)
    with open(tmp_path) as run:
        writer.write(report(2), wait=True)
        assert run["encoder.0"].t.tolist() == [1]
    assert steps_in(tmp_path) == [1, 2]


def test_steps_alone_are_written_now_and_then(tmp_path: Path) -> None:
    writer = writer_of(tmp_path / "spectra.h5")
    for step in range(1, 600):
        writer.add_steps(step_row(step))
    writer._queue.drain()
    with open(tmp_path) as run:
        assert len(run.steps) >= 512
    writer.close()
    with open(tmp_path) as run:
        assert run.steps["step"].tolist() == list(range(1, 600))


class Gate:
    """Work that waits until it may go on."""

    def __init__(self) -> None:
        self.begun, self.open = threading.Event(), threading.Event()
        self.done: list[list[int]] = []

    def __call__(self, jobs: list[int]) -> None:
        self.begun.set()
        assert self.open.wait(60)
        self.done.append(jobs)


def test_jobs_that_wait_are_done_together() -> None:
    gate = Gate()
    queue = AsyncWriter(gate, 64, name="the file")
    queue.put(0)
    assert gate.begun.wait(60)
    for job in range(1, 6):
        queue.put(job)
    gate.open.set()
    assert queue.close()
    assert gate.done == [[0], [1, 2, 3, 4, 5]]
    assert queue.waited_s == 0


def test_waiting_for_the_disk_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    queue = AsyncWriter(gate, 2, name="the file")
    threading.Timer(0.2, gate.open.set).start()
    with caplog.at_level(logging.INFO):
        for job in range(20):
            queue.put(job)
        assert queue.close()
    assert list(itertools.chain(*gate.done)) == list(range(20)), "nothing is lost"
    assert 0.05 < queue.waited_s < 60
    assert caplog.text.count("the file: 2 updates wait to be written, and the training waited 0.") == 1
    assert "Raise record.spectra_queue, or measure less often" in caplog.text
    assert f"the training waited {queue.waited_s:.2f} s in all" in caplog.text


def test_a_disk_that_hangs_holds_nothing_up(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    queue = AsyncWriter(gate, 2, name="the file", patience_s=0.05)
    for job in range(10):
        queue.put(job)
        assert gate.begun.wait(60)
    assert not queue.drain()
    assert queue.dropped == 7, "one at work, two waiting"
    assert "it hangs, and updates are dropped until it responds" in caplog.text
    gate.open.set()
    queue.patience_s = 60.0
    assert queue.close()
    assert gate.done == [[0], [1, 2]]
    assert "the file: 7 updates were dropped, since it hung" in caplog.text


def test_an_error_in_the_thread_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def work(jobs: list[int]) -> None:
        if jobs == [1]:
            raise ZeroDivisionError("a fault of ours")
        done.extend(jobs)

    done: list[int] = []
    queue = AsyncWriter(work, 8, name="the file")
    for job in (1, 2):
        queue.put(job)
        assert queue.drain()
    assert done == [2]
    assert "the file: 1 updates could not be written" in caplog.text
    assert "a fault of ours" in caplog.text
    assert queue.close()
    assert "the file: 1 updates were dropped, since it hung or an error was logged." in caplog.text


@pytest.fixture
def stubborn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A writer whose disk hangs."""

    def make(path: Path, gate: threading.Event) -> Any:
        writer = writer_of(path, queue_length=1, patience_s=0.05)
        append = writer.chain.append

        def slow(rows: Any) -> None:
            assert gate.wait(60)
            append(rows)

        monkeypatch.setattr(writer.chain, "append", slow)
        return writer

    return make


def test_flush_says_when_the_disk_hangs(tmp_path: Path, stubborn: Callable[..., Any]) -> None:
    gate = threading.Event()
    writer = stubborn(tmp_path / "spectra.h5", gate)
    writer.write(report(1))
    assert not writer.flush()
    assert writer.written == 0
    gate.set()
    writer._queue.patience_s = 60.0
    assert writer.flush()
    assert writer.written == 1
    assert steps_in(tmp_path) == [1]
