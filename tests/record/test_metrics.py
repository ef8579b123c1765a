"""``metrics.jsonl``: whole lines, no step twice, strict JSON."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc_oialr.record import MetricsWriter, read_metrics
from hpc_oialr.record.metrics import read_last_metrics


def test_lines_come_back(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write({"step": 1, "loss": 0.1 + 0.2, "phase": "full-rank"})
    assert read_metrics(writer.path) == [{"step": 1, "loss": 0.1 + 0.2, "phase": "full-rank"}]
    writer.write({"step": 2, "loss": torch.tensor(0.5), "r": {"a": np.int64(3)}, "more": (1, 2)})
    writer.close()
    assert read_metrics(writer.path)[1] == {"step": 2, "loss": 0.5, "r": {"a": 3}, "more": [1, 2]}


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write({"step": 1, "loss": float("nan"), "lr": float("inf"), "other": np.float32("nan")})
    writer.close()
    line = writer.path.read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "lr": None,
        "other": None,
    }


def test_resume_doubles_nothing(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    for step in range(10):
        writer.write({"step": step, "loss": 1 / (step + 1)})
    straight = read_metrics(writer.path)
    writer.truncate_after(6)
    assert read_metrics(writer.path) == straight[:7]
    for step in range(7, 10):
        writer.write({"step": step, "loss": 1 / (step + 1)})
    assert read_metrics(writer.path) == straight
    writer.close()


def test_a_torn_last_line_is_left_out_and_then_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    writer = MetricsWriter(path)
    writer.write({"step": 3})
    writer.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_file_of_one_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"st')
    writer = MetricsWriter(path)
    writer.truncate_after(5)
    writer.close()
    assert path.read_text() == ""
    assert read_metrics(path) == []


def test_damaged_lines_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    zeros = b"\0" * 4096
    path.write_bytes(b'{"step": 1}\nnonsense\n' + zeros + b'{"step": 2}\n' + zeros + b'\n[3]\n{"step": 4}\n')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 4}]
    assert caplog.messages == [f"line 2 of {path} and 2 more: no JSON object with a step; left out."]
    assert read_last_metrics(path, size=20) == [{"step": 4}]
    writer = MetricsWriter(path)
    writer.truncate_after(2)
    writer.close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


KILL = """
import itertools, sys
from hpc_oialr.record.metrics import MetricsWriter
writer = MetricsWriter(sys.argv[1])
for step in itertools.count():
    writer.write({"step": step, "text": "x" * 5000})
    if step == 20:
        print("go", flush=True)
"""


def test_kill_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with subprocess.Popen([sys.executable, "-c", KILL, str(path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "go\n"
        child.kill()
    steps = [record["step"] for record in read_metrics(path)]
    assert steps == list(range(len(steps)))
    assert len(steps) > 20
    writer = MetricsWriter(path)
    writer.truncate_after(10)
    writer.close()
    assert [record["step"] for record in read_metrics(path)] == list(range(11))


class SmallDisk:
    """A file on a disk with room for so many bytes more."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, content: bytes) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = content[: self.room]
        self.room -= len(taken)
        return int(self.file.write(taken))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 3, 12, 20])
def test_a_full_disk_keeps_lines_waiting(tmp_path: Path, caplog: pytest.LogCaptureFixture, room: int) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write({"step": 1})
    disk = writer._file = SmallDisk(writer._file, room)
    for step in (2, 3, 4):
        writer.write({"step": step})
    assert [row["step"] for row in read_metrics(writer.path)] == ([1, 2] if room >= 12 else [1])
    assert caplog.text.count("metrics.jsonl cannot be written ([Errno 28] No space left on device)") == 1
    disk.room = 1000
    writer.write({"step": 5})
    assert [row["step"] for row in read_metrics(writer.path)] == [1, 2, 3, 4, 5]
    disk.room = 0
    writer.write({"step": 6})
    writer.close()
    assert "1 lines are lost ([Errno 28] No space left on device)" in caplog.text
