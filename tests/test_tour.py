"""The commands of docs/tour.md, one after the other, in a smaller size."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc_oialr.cli.main import main
from hpc_oialr.errors import DataError
from hpc_oialr.exit_codes import STOPPED
from hpc_oialr.record.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
TOUR = (ROOT / "docs" / "tour.md").read_text()
# Both runs in seconds: a narrow model, few images, and of the first run so many steps that it can be stopped.
SMALL = ("--data.limit", "512", "--model.dim", "32", "--model.heads", "2", "--train.global_batch", "32")
SMALL += ("--train.evaluations", "1", "--train.device", "cpu", "--record.every", "1")
STEPS = {"oialr": ("--train.steps", "400"), "dense": ("--train.steps", "20")}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TOUR, re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("oialr ")]


def start_and_stop(words: list[str]) -> None:
    """Ctrl-C once the run has recorded steps after its conversion."""
    out = Path(words[words.index("--out") + 1])
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, "-m", "hpc_oialr", *words], env=environ, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while run.poll() is None and time.monotonic() < deadline:
            if (out / "metrics.jsonl").exists() and len(read_metrics(out / "metrics.jsonl")) > 60:
                run.send_signal(signal.SIGINT)
                break
            time.sleep(0.05)
        assert run.wait(300) == STOPPED
    finally:
        run.kill()


def small(words: list[str]) -> list[str]:
    """A training command in a smaller size."""
    side = Path(words[words.index("--out") + 1]).name if "--out" in words else ""
    return [*words, *SMALL, *STEPS[side]] if words[0] == "train" else words


@pytest.mark.long
def test_the_tour(tmp_path, monkeypatch, capsys):
    for package in ("plotly", "onnxruntime", "onnxscript", "shtab"):
        pytest.importorskip(package)
    from hpc_oialr.data import FashionMNIST

    try:
        FashionMNIST().build()
    except DataError as error:
        pytest.skip(f"make data: {error}")
    monkeypatch.chdir(tmp_path)
    assert len(COMMANDS) >= 10
    for command in COMMANDS:
        line, _, file = command.partition(" > ")
        words = small(shlex.split(line, comments=True)[1:])
        if "press Ctrl-C" in command:
            start_and_stop(words)
        else:
            assert main(words) == 0, command
        said = capsys.readouterr().out
        if file:
            Path(file.strip()).write_text(said)
    runs = tmp_path / "runs" / "tour"
    for path in ("oialr/summary.json", "dense/summary.json", "report.html", "oialr/export/hub/README.md"):
        assert (runs / path).exists(), path
    (code,) = blocks("python")
    exec(compile(code, "docs/tour.md", "exec"), {})
    assert re.search(r"tensor\(\[\d\]\)", capsys.readouterr().out)
    assert "complete" in (tmp_path / "oialr.bash").read_text()
